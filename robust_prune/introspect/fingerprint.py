"""Fingerprints of models and images, which identify the inputs of stored results."""

from __future__ import annotations

import hashlib
import re
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..data.base import ImageSet

ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def _feed(sha: hashlib._Hash, name: str, tensor: Tensor) -> None:
    sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def models_hash(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of a model's structure, parameters and buffers, including non-persistent ones.

    It is the same in all processes and on all devices, and does not depend on modes and `requires_grad` flags.
    """
    sha = hashlib.sha256()
    # Functions in attributes print their memory address, which differs between processes.
    sha.update(ADDRESS.sub("", repr(model)).encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        _feed(sha, name, tensor)
    return sha.hexdigest()


def buffers_hash(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of the buffers; batch-norm statistics change if a model is not really in eval mode."""
    sha = hashlib.sha256()
    for name, tensor in model.named_buffers():
        _feed(sha, name, tensor)
    return sha.hexdigest()


def images_hash(images: ImageSet, sample: int = 256) -> str:
    """Return the SHA-256 (hex) of the number of images and of up to `sample` evenly spaced ones with their labels.

    It is limited to a sample, since hashing a folder of photographs would cost as much as evaluating them.
    """
    sha = hashlib.sha256(str(len(images)).encode())
    count = min(sample, len(images))
    chosen = torch.linspace(0, len(images) - 1, count).round().long()
    x, y = images.get(chosen)
    _feed(sha, "images", x)
    _feed(sha, "labels", y)
    return sha.hexdigest()
