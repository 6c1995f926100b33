"""Repair of a pruned model without training."""

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
    """Repair the pruned model in place by the method ``pruning.repair`` of the recipe, and move it to `device`.

    Args:
        surgery: result of `apply`.
        dense: the dense model.
        images: training images.
        recipe: recipe with threat model, seed and the sections ``pruning`` and ``sensitivity``.
        device: ``cpu`` or ``cuda``.
        adv: adversarial set for least squares; by default it is generated.

    Raises:
        UsageError: there are too few images.
    """
    small, section = surgery.model.to(device), recipe.pruning
    count = min(section.repair_images, len(images))
    if section.repair == "batchnorm":
        reestimate_batchnorm(small, images, count=count, device=device)
    elif section.repair == "least_squares":
        dense.to(device)
        few = recipe.sensitivity.model_copy(update={"images": count})
        adv = adv or make_adversarial_set(dense, images, recipe.threat_model, few, seed=recipe.seed, device=device)
        clean, _ = random_images(images, count, recipe.seed)
        reconstruct(small, dense, surgery.removed, torch.cat([clean, adv.images]))
