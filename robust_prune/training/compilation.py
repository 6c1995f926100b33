"""Whether `torch.compile` makes a training step faster here: found by timing it, as the number format is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

WORTH_SECONDS = 300.0
"""Shortest run, in seconds of uncompiled steps, for which a compilation of up to a minute is tried."""
LEAST_GAIN = 1.05


def compiled(model: nn.Module) -> nn.Module:
    """`model` behind `torch.compile`, for batches of one size; weights, buffers and modes are shared."""
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
    """Whether `steps` steps of `compiled(model)` take less time than of `model`.

    A run shorter than `worth_seconds` is not worth the compilation, and nothing is tried. A model that does not compile
    is left as it is.

    Args:
        model: the model to compile.
        step: one training step, the attack included, with the given module; it must leave no trace.
        device: where it runs.
        steps: in the whole run.
        always: whether to compile whatever times say, as long as the model does compile.
        worth_seconds: see above.
    """
    before = _seconds(lambda: step(model), device)
    if before * steps < worth_seconds and not always:
        return False
    try:
        wrapper = compiled(model)
        after = _seconds(lambda: step(wrapper), device)
    except Exception:  # the compiler raises what its passes, its backends and a missing C++ compiler raise
        torch._dynamo.reset()
        return False
    return always or before > LEAST_GAIN * after


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The fastest of some runs, after one that warms up (and compiles)."""
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
