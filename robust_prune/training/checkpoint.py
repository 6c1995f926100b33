"""What a training run keeps so that it can be gone on with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..console import console
from .validation import Score


@dataclass
class RunState:
    """Everything that changes during a run and that a checkpoint must hold."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    accuracy_sum: float = 0.0
    elapsed: float = 0.0
    best_epoch: int = 0
    best: Score = field(default_factory=lambda: Score(-1.0, -1.0))
    note: str = ""


def read_checkpoint(path: Path | None, key: str, device: torch.device) -> dict[str, Any] | None:
    """What a run with hash `key` saved at `path`; None, and a word about why, where there is nothing to go on with."""
    if path is None or not path.exists():
        return None
    try:
        value: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file; the remedy is the same
        console.print(f"{path.name} is damaged ({error}); training starts over", markup=False)
        return None
    if value.get("key") != key:
        console.print(f"{path.name} belongs to other settings; training starts over", markup=False)
        return None
    return value
