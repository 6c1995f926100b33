"""Clean and robust accuracy on held-out training images, by which the best epoch is selected."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from .. import distributed
from ..attacks import ThreatModel, frozen_eval, pgd
from ..attacks.objectives import classify
from ..data.base import ImageSet, batches, images_at_once, labels_of
from .precision import Precision
from .randomness import generator_at


class Score(NamedTuple):
    """Robust and clean accuracy in [0, 1], ordered by robust accuracy first."""

    robust: float
    clean: float


def score(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    precision: Precision,
) -> Score:
    """Return clean accuracy and accuracy under PGD; only correctly classified images are attacked.

    The processes of a distributed run divide the batches, and all return the result.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; modes and flags are restored.
        images: held-out images and labels.
        threat: norm and radius.
        steps: PGD steps, with one random start.
        seed: random seed of the attack.
        device: device of the model.
        precision: precision and memory layout of the passes.
    """
    right = survived = 0
    with frozen_eval(model), torch.autocast(device.type, torch.bfloat16, enabled=precision.bf16):
        for index, (x, y) in enumerate(batches(images, images_at_once(images), device)):
            if index % distributed.count() != distributed.index():
                continue
            x = x.contiguous(memory_format=precision.memory_format)
            with torch.no_grad():
                keep = classify(model(x)) == y
            x, y = x[keep], y[keep]
            right += len(y)
            if len(y) == 0:
                continue
            generator = generator_at(device, seed, "validation", index)
            x_adv = pgd(model, x, y, threat, steps=steps, generator=generator, keep_best=False)
            with torch.no_grad():
                survived += int((classify(model(x_adv)) == y).sum())
    robust, clean = (sum(parts) for parts in zip(*distributed.all_gather((survived, right)), strict=True))
    total = max(len(images), 1)
    return Score(robust / total, clean / total)


def chance_note(found: Score, images: ImageSet) -> str:
    """Return a warning if `found` is no better than always predicting the most frequent class; else an empty string.

    The threshold is the one-sided 95 % bound of the accuracy of that prediction on as many images.
    """
    if len(images) == 0:
        return ""
    chance = float(labels_of(images).bincount().max()) / len(images)
    if found.clean > chance + 1.645 * math.sqrt(chance * (1 - chance) / len(images)):
        return ""
    return (
        f"held-out accuracy is {100 * found.clean:.1f} %, where naming the most frequent class gets {100 * chance:.1f}"
        ": nothing was learned. Train longer, or with another learning rate."
    )
