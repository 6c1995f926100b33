"""The norm of all weights that belong to a channel, relative to the larger ones (LAMP, arXiv 2010.07611)."""

from __future__ import annotations

from torch import Tensor
from torch_pruning.pruner.importance import LAMPImportance

from ..scoring import Scoring
from ..torch_pruning import baseline_scores


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return LAMP scores as torch-pruning computes them.

    Raises:
        UsageError: a group has no layer that LAMP can read.
    """
    return baseline_scores(LAMPImportance(), "lamp", asked.model, asked.groups)
