"""Amount of training that fits into a given time."""

from __future__ import annotations

import math

from torch import nn

from .. import distributed
from ..attacks import ThreatModel
from ..data.base import ImageSet, stratified
from ..introspect.copies import copied
from ..recipe import TrainSettings
from .trainer import train

TIMED_STEPS = 20


def affordable(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    settings: TrainSettings,
    seconds: float,
    *,
    device: str = "cpu",
    teacher: nn.Module | None = None,
) -> tuple[int, int]:
    """Return the smallest number of epochs, and the number of images in each, whose training takes `seconds`.

    Up to `TIMED_STEPS` steps of a copy are timed. Validation on held-out images is not counted.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; it is not changed.
        images: training images.
        threat: norm and radius.
        settings: training settings, of which `epochs` is ignored.
        seconds: wall time in seconds, > 0.
        device: ``cpu`` or ``cuda``.
        teacher: the dense model, if the settings use distillation.

    Returns:
        At least one epoch of at least one batch.

    Raises:
        QualityGateError, UsageError, EnvironmentProblem: as `train`.
    """
    few = stratified(images, TIMED_STEPS * settings.batch_size)
    timed = settings.model_copy(update={"epochs": 1, "validation_images": 0, "compile": "off", "trackers": ()})
    took = train(copied(model), few, stratified(images, 0), threat, timed, device=device, teacher=teacher)
    seen = max(settings.batch_size, int(len(few) * seconds / took.history[0].seconds))
    epochs = math.ceil(seen / len(images))
    return distributed.broadcast((epochs, min(len(images), max(settings.batch_size, seen // epochs))))
