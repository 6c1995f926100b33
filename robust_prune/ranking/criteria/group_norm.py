"""The L2 norm of all weights that belong to a channel."""

from __future__ import annotations

from torch import Tensor

from ..scoring import Scoring
from ..weight_norms import is_any, weight_norm


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return the L2 norm over output and input slices, norm weights and free parameters.

    Raises:
        UsageError: a group has no weights.
    """
    return {group.name: weight_norm(asked.model, group, is_any) for group in asked.groups}
