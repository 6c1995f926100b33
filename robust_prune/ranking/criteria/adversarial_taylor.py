"""The change of the loss under attack that removing a channel makes (adversarial Taylor)."""

from __future__ import annotations

from torch import Tensor

from ..scoring import Scoring
from ..taylor import taylor_scores


def score(asked: Scoring) -> dict[str, Tensor]:
    """See `ranking.taylor`, with the cross-entropy on the adversarial set."""
    return taylor_scores(asked, asked.adversarial_images("adversarial_taylor"))
