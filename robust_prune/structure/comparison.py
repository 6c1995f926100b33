"""Comparison of a cut model with the logits that it must give."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .paths import Pass
from .reference import first_line, relative_error

# Largest relative difference due to rounding; a wrong channel changes the logits by percents.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}


def compared(
    model: nn.Module, step: Pass, wanted: Tensor, dtype: torch.dtype, *, exact: bool = True, backward: bool = False
) -> tuple[str, float]:
    """Run a cut model and compare its logits with those `wanted`.

    Args:
        model: the cut model.
        step: the pass to run.
        wanted: logits [N, K].
        dtype: data type of the model.
        exact: whether values are compared; else only that it runs and its logits have the right shape.
        backward: whether it must run back to the images as well.

    Returns:
        What is wrong, or an empty string; and the relative error.
    """
    try:
        found = step.run(model, backward=backward)
    except Exception as error:
        return f"fails{_place(model, error)}: {type(error).__name__}: {first_line(error)}", float("inf")
    if found.shape != wanted.shape:
        return f"returns {tuple(found.shape)} instead of {tuple(wanted.shape)}", float("inf")
    difference = relative_error(found.detach(), wanted) if exact else 0.0
    if difference <= TOLERANCE[dtype]:
        return "", difference
    mixed = "code computes over these channels together, or ties them to others"
    return f"differs from the masked dense model by {difference:.1e} (relative): {mixed}", difference


def _place(model: nn.Module, error: BaseException) -> str:
    """Return the innermost module of `model` whose code met an error, with its line; empty if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        first = next(iter(frame.f_code.co_varnames), "")  # of a method, whatever it is called
        name = names.get(id(frame.f_locals.get(first)))
        if name is not None and not frame.f_globals.get("__name__", "").startswith("torch."):
            code = linecache.getline(frame.f_code.co_filename, line).strip()
            found = f" in {name or type(model).__name__}" + (f" ({code[:100]})" if code else "")
    return found


@contextmanager
def exchanged(model: nn.Module, own: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give `model` the values of `own` inside the ``with`` block."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data for tensor in tensors]
    for tensor, other in zip(tensors, [*own.parameters(), *own.buffers()], strict=True):
        tensor.data = other.detach().to(dtype) if other.is_floating_point() else other.detach()
    try:
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data = value
