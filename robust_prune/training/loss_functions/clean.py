"""Cross-entropy on clean images."""

from __future__ import annotations

from torch import nn

from ...recipe import TrainSettings
from ..losses import Batch, LossResult, cross_entropy


def loss(model: nn.Module, batch: Batch, settings: TrainSettings) -> LossResult:
    """Cross-entropy on the images as they are. One forward and backward."""
    return cross_entropy(model(batch.x).float(), batch.y, settings.label_smoothing)
