"""Images, a model and settings small enough to train in a second."""

from __future__ import annotations

import torch
from torch import nn

from robust_prune.attacks import ThreatModel
from robust_prune.data.base import TensorImages
from robust_prune.recipe import TrainSettings
from robust_prune.training.losses import Batch

THREAT = ThreatModel("linf", 4 / 255)


def make_images(count: int, seed: int = 0) -> TensorImages:
    """Three classes told apart by the brightest colour channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 80
    return TensorImages(images, labels)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def make_settings(**changes) -> TrainSettings:
    return TrainSettings(
        **{
            "epochs": 3, "batch_size": 16, "lr": 0.2, "ema_decay": 0.9, "crop_padding": 1, "validation_images": 30,
            "validation_steps": 2, "steps": 2, **changes,
        }
    )  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Killed(Exception):
    pass


def batch_of(model: nn.Module, count: int = 12, epsilon: float = 4 / 255, teacher: nn.Module | None = None) -> Batch:
    x, y = make_images(count).get(torch.arange(count))
    threat = ThreatModel("linf", epsilon)
    return Batch(x.float() / 255, y, threat, torch.Generator().manual_seed(0), model, teacher)
