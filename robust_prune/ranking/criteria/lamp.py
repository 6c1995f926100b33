"""The norm of all weights that go with a channel, relative to the larger ones (LAMP, arXiv 2010.07611)."""

from __future__ import annotations

from torch import Tensor
from torch_pruning.pruner.importance import LAMPImportance

from ..scoring import Scoring
from ..torch_pruning import baseline_scores


def score(asked: Scoring) -> dict[str, Tensor]:
    """As torch-pruning computes it."""
    return baseline_scores(LAMPImportance(), "lamp", asked.model, asked.groups)
