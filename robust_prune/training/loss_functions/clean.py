"""Cross-entropy on clean images."""

from __future__ import annotations

from torch import nn

from ...recipe import TrainSettings
from ..losses import Batch, LossResult, cross_entropy


def loss(model: nn.Module, batch: Batch, settings: TrainSettings) -> LossResult:
    """Return the cross-entropy on clean images. Cost: one forward and one backward pass."""
    return cross_entropy(model(batch.x).float(), batch.y, settings.label_smoothing)
