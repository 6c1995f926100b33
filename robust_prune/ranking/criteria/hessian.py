"""The second-order increase of the loss when a channel is removed (Optimal Brain Damage)."""

from __future__ import annotations

from torch import Tensor
from torch_pruning.pruner.importance import GroupHessianImportance

from ..scoring import Scoring
from ..torch_pruning import baseline_scores, with_mean_squares


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return Σ w²·mean_i g_i², where g_i is the gradient for image i (empirical Fisher in place of the Hessian).

    torch-pruning keeps only the square of the last gradient, so the mean is computed here.

    Raises:
        UsageError: there are no clean images, or a group has no layer that the criterion can read.
    """
    model = with_mean_squares(asked.model, asked.clean_images("hessian"), asked.device)
    return baseline_scores(GroupHessianImportance(), "hessian", model, asked.groups)
