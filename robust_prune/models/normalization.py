"""Normalization inside the model, so that its inputs are images in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormalizedClassifier(nn.Module):
    """Classifier of [0, 1] images that normalizes each channel and then runs `backbone`.

    Args:
        backbone: maps normalized images [N, C, H, W] to logits [N, K].
        mean, std: mean and standard deviation of each channel of [0, 1] images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        # Not saved with the weights, so that a checkpoint cannot silently override the statistics in the manifest.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W] in [0, 1]."""
        return self.backbone((images - self.mean) / self.std)
