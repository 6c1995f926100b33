"""Cross-entropy on N-FGSM examples: one attack step (de Jorge et al., 2022, arXiv 2202.01181)."""

from __future__ import annotations

from torch import nn

from ...attacks import n_fgsm
from ...recipe import TrainSettings
from ..losses import Batch, LossResult, cross_entropy


def loss(model: nn.Module, batch: Batch, settings: TrainSettings) -> LossResult:
    """Return the cross-entropy on N-FGSM examples (arXiv 2202.01181). Cost: two forward and backward passes."""
    x_adv = batch.adversarial(lambda m: n_fgsm(m, batch.x, batch.y, batch.threat, generator=batch.generator))
    return cross_entropy(model(x_adv).float(), batch.y, settings.label_smoothing)
