"""Specifications of models, from which they can be rebuilt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor


@dataclass(frozen=True)
class ModelSpec:
    """An architecture and all arguments that `registry.build` needs.

    Attributes:
        arch: ``timm/<name>``, ``torchvision/<name>``, ``cifar/<name>`` or ``path/to/file.py:function``.
        num_classes: number of logits.
        input_size: (channels, height, width) of an image.
        mean: mean of each channel of [0, 1] images, subtracted inside the model.
        std: standard deviation of each channel, by which the model divides.
        kwargs: further keyword arguments of the constructor, JSON values only.
        class_names: names of the classes; may be empty.
        source_sha256: SHA-256 of the file for ``file.py:function``; else empty.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    arch: str
    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    source_sha256: str = ""

    def blank_image(self) -> Tensor:
        """Return one black image [1, C, H, W] of the input size, for uses where only the shape matters."""
        return torch.zeros(1, *self.input_size)
