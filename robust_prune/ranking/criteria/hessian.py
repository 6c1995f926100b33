"""The loss that removing a channel costs to second order (Optimal Brain Damage)."""

from __future__ import annotations

from torch import Tensor
from torch_pruning.pruner.importance import GroupHessianImportance

from ..scoring import Scoring
from ..torch_pruning import baseline_scores, with_mean_squares


def score(asked: Scoring) -> dict[str, Tensor]:
    """Σ w²·mean_i g_i² with g_i the gradient of one image, the empirical Fisher matrix in place of the Hessian.

    torch-pruning keeps the last image's square only, so the mean is made here.
    """
    model = with_mean_squares(asked.model, asked.clean_images("hessian"), asked.device)
    return baseline_scores(GroupHessianImportance(), "hessian", model, asked.groups)
