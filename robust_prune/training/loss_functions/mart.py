"""MART: adversarial training that weighs misclassified images more (Wang et al., ICLR 2020)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...recipe import TrainSettings
from ..losses import Batch, LossResult, accuracy_of, clean_and_adversarial, divergence_from, pgd_images


def loss(model: nn.Module, batch: Batch, settings: TrainSettings) -> LossResult:
    """Return the MART loss (Wang et al., ICLR 2020, OpenReview rklOg6EFwS).

    It is the boosted cross-entropy on PGD examples plus `beta` times KL(clean || adversarial), weighted by one minus
    the clean probability of the label. Cost: `steps` + 2 forward and backward passes.
    """
    x_adv = batch.adversarial(partial(pgd_images, batch=batch, steps=settings.steps))
    clean_logits, logits = clean_and_adversarial(model, batch, x_adv)
    own = batch.y[:, None]
    rival = F.softmax(logits, dim=1).scatter(1, own, 0.0).amax(1)
    # The clamp keeps log(1 - rival) finite where the rival's probability rounds to one.
    boosted = (
        F.cross_entropy(logits, batch.y, label_smoothing=settings.label_smoothing)
        - torch.log1p(-rival.clamp_max(1 - 1e-6)).mean()
    )
    doubt = 1 - F.softmax(clean_logits, dim=1).gather(1, own).squeeze(1)
    divergence = (divergence_from(logits, F.log_softmax(clean_logits, dim=1)) * doubt).mean()
    metrics = {"accuracy": accuracy_of(logits, batch.y), "divergence": divergence.detach()}
    return LossResult(boosted + settings.beta * divergence, metrics, logits)
