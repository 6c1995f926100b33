"""What names a model: enough to build it again anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor


@dataclass(frozen=True)
class ModelSpec:
    """An architecture reference with everything that `build` needs.

    Attributes:
        arch: ``timm/<name>``, ``torchvision/<name>``, ``cifar/<name>`` or ``path/to/file.py:function``.
        num_classes: number of logits.
        input_size: (channels, height, width) of one image.
        mean: per channel, of [0, 1] images; subtracted inside the model.
        std: per channel; what is left is divided by it inside the model.
        kwargs: extra keyword arguments of the architecture's constructor (JSON values only).
        class_names: names of the logits, or empty.
        source_sha256: for ``file.py:function``, the hash of the file's text; else empty.
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
        """One black image [1, C, H, W] of the input size, where only the shape matters."""
        return torch.zeros(1, *self.input_size)
