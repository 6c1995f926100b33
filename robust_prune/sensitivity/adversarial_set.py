"""The adversarial set D_adv on which sensitivity and importance are measured, made once per model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..attacks.pgd import pgd
from ..attacks.threat import ThreatModel
from ..console import track
from ..data.base import ImageSet, batches, images_at_once, random_subset
from ..errors import UsageError
from ..models.layout import weights_dtype
from ..recipe import SensitivitySection


@dataclass(frozen=True)
class AdversarialSet:
    """Fixed adversarial images with their labels.

    Attributes:
        images: float32 [N, C, H, W] in [0, 1], on the CPU.
        labels: int64 [N], on the CPU.
        threat: norm and radius of the attack.
        seed: what chose the images and the random starts.
    """

    images: Tensor
    labels: Tensor
    threat: ThreatModel
    seed: int

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise UsageError(
                f"adversarial images must be float32 [N, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if len(self.images) != len(self.labels) or len(self.images) == 0:
            raise UsageError(f"an adversarial set needs one label an image, got {len(self.images)} images "
                             f"and {len(self.labels)} labels")  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)


def make_adversarial_set(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    section: SensitivitySection | None = None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AdversarialSet:
    """Attacks random images with PGD in eval mode.

    Pass the training split: the set steers what is pruned, so neither validation nor test images belong in it.

    Args:
        model: maps [0, 1] images to logits; already on `device`, left as it came.
        images: where the images are drawn from, without replacement; all of them, if there are too few.
        threat: what the attacker may do.
        section: number of images and of PGD steps; the defaults of recipes without it.
        batch_size: images attacked at once; see `images_at_once` for the default.
        seed: of the choice of images and of the random starts.
        device: where the attack runs.

    Raises:
        UsageError: no images, or `batch_size` below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size of the adversarial set must be at least 1, got {batch_size}")
    section = section or SensitivitySection()
    chosen = random_subset(images, section.images, seed)
    if len(chosen) == 0:
        raise UsageError("the adversarial set needs training images, found none. Check the data source.")
    generator, dtype = torch.Generator().manual_seed(seed), weights_dtype(model)
    made: list[Tensor] = []
    labels: list[Tensor] = []
    with frozen_eval(model), track(f"Adversarial set, PGD-{section.steps}", len(chosen)) as advance:
        for x, y in batches(chosen, batch_size or images_at_once(chosen), device):
            made.append(pgd(model, x.to(dtype), y, threat, steps=section.steps, generator=generator).float().cpu())
            labels.append(y.long().cpu())
            advance(len(y))
    return AdversarialSet(torch.cat(made), torch.cat(labels), threat, seed)
