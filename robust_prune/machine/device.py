"""Where torch computes."""

from __future__ import annotations

import torch

from ..errors import EnvironmentProblem


def choose_device(name: str) -> str:
    """``cpu`` or ``cuda``, of ``auto``, ``cpu`` or ``cuda``: with ``auto`` a GPU where torch finds one.

    Raises:
        EnvironmentProblem: CUDA was asked for and is not there.
    """
    found = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if found else "cpu"
    if name == "cuda" and not found:
        raise EnvironmentProblem("device cuda was asked for, but torch finds no CUDA device. Use --device cpu.")
    return name
