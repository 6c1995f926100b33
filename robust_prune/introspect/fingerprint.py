"""Fingerprints that tie what is stored to the model and the images it was made from."""

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
    """SHA-256 (hex) of a model's structure, parameters and buffers, the ones that are not saved included.

    Equal across processes and devices; the train/eval mode and `requires_grad` flags do not enter.
    """
    sha = hashlib.sha256()
    # Functions kept as attributes print their memory address, which differs from process to process.
    sha.update(ADDRESS.sub("", repr(model)).encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        _feed(sha, name, tensor)
    return sha.hexdigest()


def buffers_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the buffers alone: batch-norm statistics move when a model is not really in eval mode."""
    sha = hashlib.sha256()
    for name, tensor in model.named_buffers():
        _feed(sha, name, tensor)
    return sha.hexdigest()


def images_hash(images: ImageSet, sample: int = 256) -> str:
    """SHA-256 (hex) of the number of images and of up to `sample` of them, evenly spread, with their labels.

    A sample only, because hashing a folder of photographs would cost as much as evaluating them.
    """
    sha = hashlib.sha256(str(len(images)).encode())
    count = min(sample, len(images))
    chosen = torch.linspace(0, len(images) - 1, count).round().long()
    x, y = images.get(chosen)
    _feed(sha, "images", x)
    _feed(sha, "labels", y)
    return sha.hexdigest()
