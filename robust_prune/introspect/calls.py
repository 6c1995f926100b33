"""Which module of a model runs, fails, or answers differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

THE_MODEL = "the model"
_TOLERANCE = 1e-3  # of the largest value; rounding in float32 is far below


@dataclass(frozen=True, eq=False)
class Call:
    """A finished call of a module: its name and class, and the tensors in and out, of the first image alone."""

    name: str
    came: list[Tensor]
    went: list[Tensor]


@contextmanager
def running(model: nn.Module, finished: Callable[[str, Any, Any], None] | None = None) -> Iterator[Callable[[], str]]:
    """Follow the calls of modules inside the ``with`` block.

    Args:
        model: the model; scripted modules in it are not followed.
        finished: is called with name, inputs and output of every call that ends.

    Yields:
        A function that returns the name and class of the innermost module that runs or has failed, or "the model".
    """
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        label = f"{name} ({type(module).__name__})" if name else THE_MODEL

        def enter(module: nn.Module, args: Any, label: str = label) -> None:
            stack.append(label)

        def leave(module: nn.Module, args: Any, output: Any, label: str = label) -> None:
            stack.pop()
            if finished is not None:
                finished(label, args, output)

        handles += [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield lambda: stack[-1] if stack else THE_MODEL
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def guilty_of_difference(model: nn.Module, first: Tensor, second: Tensor) -> str:
    """Return the module whose output for the first image differs between two passes although its input is the same.

    Args:
        model: the model, in the mode in which it is run.
        first, second: images [N, C, H, W] of the two passes, which begin with the same image.

    Returns:
        Name and class of the innermost such module; "the model" if none is found.
    """
    for a, b in zip(_calls(model, first), _calls(model, second), strict=False):
        if a.name != b.name:  # the module around both calls one or the other
            return _around(model, a.name, b.name)
        if _alike(a.came, b.came) and not _alike(a.went, b.went):
            return a.name
    return THE_MODEL


@torch.no_grad()
def guilty_of_overflow(model: nn.Module, images: Tensor) -> str:
    """Return the innermost module that makes values which are not finite from finite ones, or "the model"."""
    for call in _calls(model, images):
        if all(map(_finite, call.came)) and not all(map(_finite, call.went)):
            return call.name
    return THE_MODEL


def _around(model: nn.Module, first: str, second: str) -> str:
    parts = [label.partition(" ")[0].split(".") for label in (first, second)]
    common = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(*parts, strict=False))]
    name = ".".join(common)
    return f"{name} ({type(model.get_submodule(name)).__name__})" if name else THE_MODEL


def _calls(model: nn.Module, images: Tensor) -> list[Call]:
    found: list[Call] = []

    def keep(name: str, args: Any, output: Any) -> None:
        came, went = ([t[:1].clone() for t in _rows(values, len(images))] for values in (args, output))
        found.append(Call(name, came, went))

    with running(model, keep):
        model(images)
    return found


def _rows(value: Any, count: int) -> Iterator[Tensor]:
    """Yield the tensors in `value` that hold one row for each of `count` images."""
    if isinstance(value, Tensor):
        if value.dim() > 0 and len(value) == count:
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _rows(part, count)


def _alike(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * a.abs().max())
        for a, b in zip(first, second, strict=True)
        if a.is_floating_point() and a.numel()
    )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
