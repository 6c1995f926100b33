"""Random numbers that depend only on the seed and the position in a run, so that a resumed run draws the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_at(device: torch.device | str, seed: int, *position: int | str) -> torch.Generator:
    """Return the generator of a position in a run, e.g. ``generator_at(device, seed, "step", epoch, step)``."""
    text = ":".join(str(part) for part in (seed, *position))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator(device=device).manual_seed(value)


@contextmanager
def seeded_layers(device: torch.device, seed: int, *position: int) -> Iterator[None]:
    """Seed random layers such as dropout by the position in a run; restore the random state on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator_at("cpu", seed, "layers", *position).initial_seed())
        yield
