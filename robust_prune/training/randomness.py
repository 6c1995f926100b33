"""Random numbers that depend on where a run stands, not on what ran before: a resumed run draws the same ones."""

from __future__ import annotations

import hashlib

import torch


def generator_at(device: torch.device | str, seed: int, *position: int | str) -> torch.Generator:
    """A generator for one place of a run, e.g. ``generator_at(device, seed, "step", epoch, step)``."""
    text = ":".join(str(part) for part in (seed, *position))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator(device=device).manual_seed(value)
