"""Random numbers that depend on where a run stands, not on what ran before: a resumed run draws the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_at(device: torch.device | str, seed: int, *position: int | str) -> torch.Generator:
    """A generator for one place of a run, e.g. ``generator_at(device, seed, "step", epoch, step)``."""
    text = ":".join(str(part) for part in (seed, *position))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator(device=device).manual_seed(value)


@contextmanager
def seeded_layers(device: torch.device, seed: int, *position: int) -> Iterator[None]:
    """What layers such as dropout draw depends on where the run stands; the caller's random state is kept."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator_at("cpu", seed, "layers", *position).initial_seed())
        yield
