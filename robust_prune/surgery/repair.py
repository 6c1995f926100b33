"""Repair of a pruned model without training."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..console import console
from ..data.base import ImageSet, random_images
from ..models.branches import taken_out
from ..models.layout import fastest_passes, weights_dtype
from ..recipe import Recipe
from ..sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from ..structure.branches import mean_result
from ..structure.cutting import Place
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
        adv: adversarial set for least squares; by default `repair_set` generates it.

    Raises:
        UsageError: there are too few images.
    """
    small, section = surgery.model.to(device), recipe.pruning
    if section.repair == "batchnorm":
        reestimate_batchnorm(small, images, count=min(section.repair_images, len(images)), device=device)
    elif section.repair == "least_squares":
        dense.to(device)
        adv = adv or repair_set(dense, images, recipe, device)
        clean, _ = random_images(images, min(section.repair_images, len(images)), recipe.seed)
        shown = torch.cat([clean, adv.images])
        fit_branches(small, dense, surgery.removed, shown)
        few = shown[:2].to(device, weights_dtype(dense))
        with frozen_eval(dense), frozen_eval(small):
            ways = [fastest_passes(model, few) for model in (dense, small)]
        last = all(layout == torch.channels_last for layout, _ in ways)
        shown = shown.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        reconstruct(small, dense, surgery.removed, shown, bf16=all(bf16 for _, bf16 in ways))


def repair_set(dense: nn.Module, images: ImageSet, recipe: Recipe, device: str) -> AdversarialSet:
    """Return the adversarial set for least squares: ``pruning.repair_images`` images attacked on the dense model."""
    count = min(recipe.pruning.repair_images, len(images))
    section = recipe.sensitivity.model_copy(update={"images": count})
    return make_adversarial_set(dense, images, recipe.threat_model, section, seed=recipe.seed, device=device)


@torch.no_grad()
def fit_branches(small: nn.Module, dense: nn.Module, removed: Mapping[Place, Collection[int]], images: Tensor) -> None:
    """Set the constants in place of branches to the mean of what the branches return in the dense model, in place.

    The mean is the constant nearest to the branch in the sense of least squares.

    Args:
        small: the pruned model.
        dense: the dense model on the same device.
        removed: removed positions of the dense model (`Surgery.removed`).
        images: training images, clean and adversarial, [N, C, H, W] in [0, 1], on any device.
    """
    earlier = taken_out(dense)
    for name, branch in taken_out(small).items():
        if name in earlier:
            continue
        constant, mean = small.get_parameter(name), mean_result(dense, branch, images)
        lost = set(removed.get((f"{branch.block}.{branch.readers[0]}", "out", 0), ()))
        kept = torch.tensor([i for i in range(len(mean)) if i not in lost], device=mean.device)
        if len(kept) != len(constant):
            console.print(
                f"{name}: not fitted, since channels are counted otherwise behind {branch.readers[0]}. Fine-tuning "
                "starts from what the branch returns without its channels.",
                markup=False,
            )
            continue
        constant.copy_(mean[kept])
