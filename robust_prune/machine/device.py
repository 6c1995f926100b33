"""Choice of the torch device."""

from __future__ import annotations

import torch

from ..errors import EnvironmentProblem


def choose_device(name: str) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``; ``auto`` is ``cuda`` if torch finds a GPU.

    Raises:
        EnvironmentProblem: `name` is ``cuda``, but torch finds no GPU.
    """
    found = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if found else "cpu"
    if name == "cuda" and not found:
        raise EnvironmentProblem("device cuda was asked for, but torch finds no CUDA device. Use --device cpu.")
    return name
