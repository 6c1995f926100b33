"""Placement of the teacher and the images of a training run on the device."""

from __future__ import annotations

import torch
from torch import nn

from ..data.base import ImageSet, Subset, TensorImages
from ..introspect.copies import copied
from .precision import Precision


def frozen_copy(teacher: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """Return a frozen copy of the teacher in eval mode on `device`, in the memory format of `precision`."""
    placed = copied(teacher).eval().requires_grad_(False).to(device)
    precision.arrange(placed)
    return placed


def resident(images: ImageSet, device: torch.device) -> ImageSet:
    """Return the images as one tensor on `device` if they are in memory, else unchanged."""
    if isinstance(images, Subset):
        base = resident(images.base, torch.device("cpu"))
        if isinstance(base, TensorImages):
            return TensorImages(base.images[images.indices], base.labels[images.indices]).to(device)
        return images
    return images.to(device) if isinstance(images, TensorImages) else images
