"""The first-order change of the adversarial loss when a channel is removed (adversarial Taylor)."""

from __future__ import annotations

from torch import Tensor

from ..scoring import Scoring
from ..taylor import taylor_scores


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return Taylor scores of the cross-entropy on the adversarial set; see `ranking.taylor`.

    Raises:
        UsageError: there is no adversarial set, or a group has no layer that Taylor scores can use.
    """
    return taylor_scores(asked, asked.adversarial_images("adversarial_taylor"))
