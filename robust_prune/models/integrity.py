"""Hashes of the tensors of a model file, by which changed bytes are found when it is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

MANIFEST = "manifest"
"""Key of the hash of the manifest itself, with the hashes of all tensors: the hash of the whole file's contents."""


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 (hex) of data type, shape and values of a tensor."""
    sha = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return sha.hexdigest()


def sealed(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the manifest with the hashes of all tensors, and with its own."""
    value = {**manifest, "sha256": {name: tensor_sha256(tensor) for name, tensor in tensors.items()}}
    return {**value, MANIFEST: _own(value)}


def check(manifest: Mapping[str, Any], tensors: Mapping[str, Any], what: str) -> None:
    """Hold tensors and manifest against the hashes that `sealed` stored.

    Raises:
        UsageError: a tensor or the manifest is not what was written; the message names the first.
    """
    hashes = manifest.get("sha256")
    if not isinstance(hashes, Mapping) or manifest.get(MANIFEST) != _own(manifest):
        raise UsageError(f"the manifest of {what} is damaged: it is not the one that was written. Copy the file again.")
    if odd := sorted(hashes.keys() ^ tensors.keys()):
        raise UsageError(f"{what} is damaged: tensor {odd[0]!r} is missing or not its own. Copy the file again.")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor_sha256(tensor) != hashes[name]:
            raise UsageError(
                f"{what} is damaged: tensor {name!r} is not the one that was written (SHA-256). Copy the file again."
            )


def _own(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != MANIFEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
