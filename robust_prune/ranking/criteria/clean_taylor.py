"""The change of the loss on clean images that removing a channel makes (Taylor)."""

from __future__ import annotations

from torch import Tensor

from ..scoring import Scoring
from ..taylor import taylor_scores


def score(asked: Scoring) -> dict[str, Tensor]:
    """See `ranking.taylor`, with the cross-entropy on clean images (Molchanov et al., 2019, arXiv 1906.10771)."""
    return taylor_scores(asked, asked.clean_images("clean_taylor"))
