"""Training loss of network slimming (Liu et al., 2017, arXiv 1708.06519) for robust models."""

from __future__ import annotations

from torch import nn

from robust_prune.recipe import TrainSettings
from robust_prune.training.losses import Batch, LossResult, make_loss

PENALTY = 1e-4
"""Weight of the L1 penalty, as in the paper's experiments on CIFAR-10."""


def n_fgsm_l1(model: nn.Module, batch: Batch) -> LossResult:
    """Return the loss of N-FGSM plus an L1 penalty on the scales of all batch-norm layers."""
    found = make_loss(TrainSettings(loss="n_fgsm"))(model, batch)
    scales = [m.weight for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    penalty = sum((scale.abs().sum() for scale in scales if scale is not None), start=0 * found.loss)
    return LossResult(found.loss + PENALTY * penalty, found.metrics, found.logits)
