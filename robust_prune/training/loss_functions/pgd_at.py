"""Cross-entropy on PGD examples (Madry et al., 2018, arXiv 1706.06083)."""

from __future__ import annotations

from functools import partial

from torch import nn

from ...recipe import TrainSettings
from ..losses import Batch, LossResult, cross_entropy, pgd_images


def loss(model: nn.Module, batch: Batch, settings: TrainSettings) -> LossResult:
    """Return the cross-entropy on PGD examples (Madry et al., 2018, arXiv 1706.06083).

    Cost: `steps` + 1 forward and backward passes.
    """
    x_adv = batch.adversarial(partial(pgd_images, batch=batch, steps=settings.steps))
    return cross_entropy(model(x_adv).float(), batch.y, settings.label_smoothing)
