"""Repair of a cut model without training."""

from __future__ import annotations

import torch
from torch import nn

from ..data.base import ImageSet, random_images
from ..recipe import Recipe
from ..sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from .apply import Surgery
from .batchnorm import reestimate_batchnorm
from .reconstruction import reconstruct


def repair(
    surgery: Surgery,
    dense: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    device: str,
    adv: AdversarialSet | None = None,
) -> None:
    """Repairs the cut model in place as the recipe's ``pruning.compensation`` says; it ends on `device`.

    Args:
        surgery: what `apply` left.
        dense: the model that was cut.
        images: training images.
        recipe: threat model, seed, and the sections ``pruning`` and ``sensitivity``.
        device: ``cpu`` or ``cuda``.
        adv: the adversarial set that least squares reads; without one it is made.
    """
    small, section = surgery.model.to(device), recipe.pruning
    count = min(section.compensation_images, len(images))
    if section.compensation == "batchnorm":
        reestimate_batchnorm(small, images, count=count, device=device)
    elif section.compensation == "least_squares":
        dense.to(device)
        few = recipe.sensitivity.model_copy(update={"images": count})
        adv = adv or make_adversarial_set(dense, images, recipe.threat_model, few, seed=recipe.seed, device=device)
        clean, _ = random_images(images, count, recipe.seed)
        reconstruct(small, dense, surgery.removed, torch.cat([clean, adv.images]))
