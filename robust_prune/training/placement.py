"""Where the teacher and the images of a training run lie."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..data.base import ImageSet, Subset, TensorImages
from .precision import Precision


def frozen_copy(teacher: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """A copy in eval mode without gradients, laid out like the student."""
    placed = copy.deepcopy(teacher).eval().requires_grad_(False).to(device)
    precision.arrange(placed)
    return placed


def resident(images: ImageSet, device: torch.device) -> ImageSet:
    """The same images as one tensor on `device` when they are in memory already, else as they are."""
    if isinstance(images, Subset):
        base = resident(images.base, torch.device("cpu"))
        if isinstance(base, TensorImages):
            return TensorImages(base.images[images.indices], base.labels[images.indices]).to(device)
        return images
    return images.to(device) if isinstance(images, TensorImages) else images
