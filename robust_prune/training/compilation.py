"""Decides by timing whether `torch.compile` makes a training step faster on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

WORTH_SECONDS = 300.0
"""Shortest run, in seconds of uncompiled steps, for which compilation (up to a minute) is tried."""
LEAST_GAIN = 1.05


def compiled(model: nn.Module) -> nn.Module:
    """Return `model` wrapped by `torch.compile` for a fixed batch size; weights, buffers and modes are shared."""
    return cast(nn.Module, torch.compile(model, dynamic=False))


def pays(
    model: nn.Module,
    step: Callable[[nn.Module], object],
    device: torch.device,
    *,
    steps: int,
    always: bool = False,
    worth_seconds: float = WORTH_SECONDS,
) -> bool:
    """Return whether a training step of `compiled(model)` is at least 5 % faster than one of `model`.

    Compilation is not tried if the run takes less than `worth_seconds`. The result is False if the model does not
    compile.

    Args:
        model: the model.
        step: runs one training step of the given module, including the attack, without changing any state.
        device: device of the model.
        steps: number of steps of the run.
        always: return True whenever the model compiles, whatever the times.
        worth_seconds: shortest run, in seconds of uncompiled steps, for which compilation is tried.
    """
    before = _seconds(lambda: step(model), device)
    if before * steps < worth_seconds and not always:
        return False
    try:
        wrapper = compiled(model)
        after = _seconds(lambda: step(wrapper), device)
    except Exception:  # compiler passes, backends and a missing C++ compiler raise errors of many kinds
        torch._dynamo.reset()
        return False
    return always or before > LEAST_GAIN * after


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the seconds of the fastest run, after one for warm-up and compilation."""
    times = []
    for _ in range(1 + repeats):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
