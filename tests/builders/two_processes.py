"""A training that one process does, or two."""

from __future__ import annotations

import torch
from torch import nn

from builders.training_sample import THREAT, make_images, make_model, make_settings
from robust_prune.data.base import TensorImages
from robust_prune.introspect.fingerprint import images_hash
from robust_prune.training.trainer import train


def plain_model() -> nn.Module:
    """Without batch-norm, whose statistics depend on how a batch is divided."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


class Counted:
    """Images that are not in memory, which note how many were asked for by training."""

    def __init__(self, images: TensorImages) -> None:
        self.images, self.labels, self.asked = images, images.labels, 0

    def __len__(self) -> int:
        return len(self.images)

    def get(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += len(indices)
        return self.images.get(indices)


def run_counted() -> int:
    """Number of images that this process read in two epochs of 96, in batches of 16."""
    images = Counted(make_images(96))
    settings = make_settings(loss="n_fgsm", epochs=2, precision="fp32", workers=0)
    before = images_hash(images)
    asked = images.asked
    train(plain_model(), images, make_images(30, 1), THREAT, settings)
    return images.asked - 2 * asked if before else 0


def run(loss: str, kind: str = "plain") -> nn.Module:
    torch.set_num_threads(1)
    model = plain_model() if kind == "plain" else make_model()
    settings = make_settings(loss=loss, epochs=4, precision="fp32", lr=0.1)
    train(model, make_images(96), make_images(30, 1), THREAT, settings)
    return model
