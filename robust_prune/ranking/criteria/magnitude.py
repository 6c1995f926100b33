"""The L2 norm of the weights that compute a channel."""

from __future__ import annotations

from torch import Tensor

from ..scoring import Scoring
from ..weight_norms import is_out, weight_norm


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return the L2 norm of the producers' output slices, without biases.

    Raises:
        UsageError: a group has no weights on its output side.
    """
    return {group.name: weight_norm(asked.model, group, is_out) for group in asked.groups}
