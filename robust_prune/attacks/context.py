"""Context managers that restore the model after an attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..introspect.modes import eval_mode


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in eval mode and freeze its parameters; restore every mode and `requires_grad` flag on exit.

    With frozen parameters autograd skips the weight gradients, which makes input gradients faster.

    Args:
        model: any module; under DDP, the unwrapped one.

    Yields:
        The same model.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with eval_mode(model):
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield model
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers of `model`, batch-norm statistics among them, on exit."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
