"""A training that one process does, or two."""

from __future__ import annotations

import torch
from torch import nn

from builders.training_sample import THREAT, make_images, make_model, make_settings
from robust_prune.training.trainer import train


def plain_model() -> nn.Module:
    """Without batch-norm, whose statistics depend on how a batch is divided."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def run(loss: str, kind: str = "plain") -> nn.Module:
    torch.set_num_threads(1)
    model = plain_model() if kind == "plain" else make_model()
    settings = make_settings(loss=loss, epochs=4, precision="fp32", lr=0.1)
    train(model, make_images(96), make_images(30, 1), THREAT, settings)
    return model
