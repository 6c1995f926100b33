"""TRADES: clean cross-entropy plus the divergence of attacked images from clean ones (arXiv 1901.08573)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...recipe import TrainSettings
from ..losses import Batch, LossResult, accuracy_of, clean_and_adversarial, divergence_from, pgd_images


def loss(model: nn.Module, batch: Batch, settings: TrainSettings) -> LossResult:
    """Return the clean cross-entropy plus `beta` times KL(clean || adversarial) (Zhang et al., 2019, arXiv 1901.08573).

    The clean distribution from which the attack moves away is computed once. Cost: `steps` + 3 forward and `steps` + 2
    backward passes.
    """

    def attack(attacked: nn.Module) -> Tensor:
        with torch.no_grad():
            reference = F.log_softmax(attacked(batch.x).float(), dim=1)
        return pgd_images(attacked, batch, settings.steps, lambda logits: divergence_from(logits, reference))

    clean_logits, logits = clean_and_adversarial(model, batch, batch.adversarial(attack))
    supervised = F.cross_entropy(clean_logits, batch.y, label_smoothing=settings.label_smoothing)
    divergence = divergence_from(logits, F.log_softmax(clean_logits, dim=1)).mean()
    metrics = {"accuracy": accuracy_of(logits, batch.y), "divergence": divergence.detach()}
    return LossResult(supervised + settings.beta * divergence, metrics, logits)
