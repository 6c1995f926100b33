"""The adversarial set D_adv on which sensitivity and importance are measured; it is generated once for each model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..attacks.pgd import pgd
from ..attacks.threat import ThreatModel
from ..console import track
from ..data.base import ImageSet, batches, images_at_once, plain_strides, random_subset
from ..errors import UsageError
from ..models.layout import fastest_passes, weights_dtype
from ..recipe import SensitivitySection


@dataclass(frozen=True)
class AdversarialSet:
    """Fixed adversarial images with their labels.

    Attributes:
        images: float32 [N, C, H, W] in [0, 1], on the CPU.
        labels: int64 [N], on the CPU.
        threat: norm and radius of the attack.
        seed: random seed of the choice of images and of the random starts.

    Raises:
        UsageError: the set is empty, the images have another type or shape, or the number of labels differs.
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
    """Attack random images with PGD in eval mode, in bf16 where hardware and model support it.

    Pass the training split: the set decides what is pruned, so it must contain neither validation nor test images.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; already on `device`, not changed.
        images: set from which the images are drawn without replacement; all of them if there are too few.
        threat: norm and radius.
        section: number of images and of PGD steps; by default those of `SensitivitySection`.
        batch_size: images in each batch; by default `images_at_once`.
        seed: random seed of the choice of images and of the random starts.
        device: device on which the attack runs.

    Raises:
        UsageError: there are no images, or `batch_size` is below 1.
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
            x = x.to(dtype)
            if not made:
                layout, bf16 = fastest_passes(model, x[:2])
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                found = pgd(
                    model, x.contiguous(memory_format=layout), y, threat, steps=section.steps, generator=generator
                )
            made.append(plain_strides(found.float().cpu()))
            labels.append(y.long().cpu())
            advance(len(y))
    return AdversarialSet(torch.cat(made), torch.cat(labels), threat, seed)
