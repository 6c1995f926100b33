"""The distance of a filter to the other filters of its layer (FPGM, He et al., CVPR 2019)."""

from __future__ import annotations

from torch import Tensor
from torch_pruning.pruner.importance import FPGMImportance

from ..scoring import Scoring
from ..torch_pruning import baseline_scores


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return the distance of each filter to the others of its layer, summed over them, as torch-pruning computes it.

    Raises:
        UsageError: a group has no layer that FPGM can read.
    """
    return baseline_scores(FPGMImportance(), "fpgm", asked.model, asked.groups)
