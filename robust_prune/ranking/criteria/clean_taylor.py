"""The first-order change of the loss on clean images when a channel is removed (Taylor)."""

from __future__ import annotations

from torch import Tensor

from ..scoring import Scoring
from ..taylor import taylor_scores


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return Taylor scores (Molchanov et al., 2019, arXiv 1906.10771) of the cross-entropy on clean images.

    See `ranking.taylor`.

    Raises:
        UsageError: there are no clean images, or a group has no layer that Taylor scores can use.
    """
    return taylor_scores(asked, asked.clean_images("clean_taylor"))
