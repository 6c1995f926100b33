"""Attacking a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..introspect.modes import eval_mode


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Puts `model` in eval mode with frozen parameters, and undoes both module by module, parameter by parameter.

    Frozen parameters make input gradients cheaper, since autograd then skips every weight gradient.

    Args:
        model: any module; under DDP pass the unwrapped one.

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
    """Buffers, batch-norm statistics among them, leave as they came."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
