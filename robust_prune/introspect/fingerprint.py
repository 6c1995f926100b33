"""Fingerprints of models and images, which identify the inputs of stored results."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.base import ImageSet, Subset, TensorImages, labels_of

_AT_ONCE = 4096
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
    """Return the SHA-256 (hex) of a set of images and their labels.

    All labels count. Images in memory are hashed whole. Of images that are decoded on access, `sample` evenly spaced
    ones are hashed, and the path, size and time of every file, since hashing the contents of a folder of photographs
    would cost as much as evaluating them.
    """
    sha = hashlib.sha256(str(len(images)).encode())
    _feed(sha, "labels", labels_of(images))
    everything = torch.arange(len(images))
    while isinstance(images, Subset):
        everything, images = images.indices[everything], images.base
    in_memory = isinstance(images, TensorImages)
    chosen = torch.linspace(0, len(everything) - 1, min(sample, len(everything))).round().long()
    for part in (everything if in_memory else everything[chosen]).split(_AT_ONCE):
        _feed(sha, "images", images.get(part)[0])
    keys: Sequence[object] = () if in_memory else getattr(images, "keys", ())
    for position in everything.tolist() if keys else ():
        sha.update(f"{keys[position]!r}|".encode())
    paths: Sequence[Path] = getattr(images, "paths", ())
    for position in everything.tolist() if paths else ():
        found = paths[position].stat()
        sha.update(f"{paths[position]}|{found.st_size}|{found.st_mtime_ns}|".encode(errors="surrogateescape"))
    return sha.hexdigest()
