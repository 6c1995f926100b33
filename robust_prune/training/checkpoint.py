"""Checkpoints from which a training run is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..archives import check_archive
from ..console import console
from ..models.integrity import tensor_sha256
from ..models.weight_files import check_values
from ..runs.files import atomic_write
from .validation import Score

SHA256 = "sha256"
FORMAT = 2
"""Version of what a checkpoint holds."""


@dataclass
class RunState:
    """State of a training run in a checkpoint, besides weights and optimizer.

    Attributes:
        epoch: completed epochs.
        step: completed steps of the current epoch.
        loss_sum, accuracy_sum: training loss in nats and training accuracy in [0, 1], summed over these steps.
        elapsed: seconds spent in the current epoch.
        waited: seconds of these in which no step ran, since images were being read.
        best_epoch: epoch of the best weights; 0 is the start.
        start, best: held-out scores before the first epoch and of the best weights.
        note: why training ended early; empty otherwise.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    accuracy_sum: float = 0.0
    elapsed: float = 0.0
    waited: float = 0.0
    best_epoch: int = 0
    start: Score = field(default_factory=lambda: Score(-1.0, -1.0))
    best: Score = field(default_factory=lambda: Score(-1.0, -1.0))
    note: str = ""


def write_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """Write a checkpoint atomically, with the hash of all that it holds.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    atomic_write(path, lambda part: torch.save({**value, SHA256: contents_sha256(value)}, part))


def contents_sha256(value: Any) -> str:
    """Return the SHA-256 (hex) of tensors and plain values inside dicts, lists and tuples."""
    sha = hashlib.sha256()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            sha.update(tensor_sha256(item).encode())
        elif isinstance(item, Mapping):
            sha.update(f"{len(item)}{{".encode())
            waiting += [part for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            sha.update(f"{len(item)}[".encode())
            waiting += item
        else:
            sha.update(f"{item!r};".encode())
    return sha.hexdigest()


def read_checkpoint(path: Path | None, key: str, device: torch.device) -> dict[str, Any] | None:
    """Return the checkpoint that a run with hash `key` saved at `path`, or None.

    A checkpoint that is damaged or belongs to other settings is ignored with a message.
    """
    if path is None or not path.exists():
        return None
    try:
        check_archive(path)
        value: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        check_values(value, path)
    except Exception as error:  # torch raises many kinds of errors for a damaged file, some of a page
        console.print(f"{path.name} is damaged ({type(error).__name__}); training starts over", markup=False)
        return None
    if not isinstance(value, dict) or value.pop(SHA256, None) != contents_sha256(value):
        console.print(f"{path.name} is damaged (SHA-256); training starts over", markup=False)
        return None
    if value.get("key") != key:
        console.print(f"{path.name} belongs to other settings; training starts over", markup=False)
        return None
    return value
