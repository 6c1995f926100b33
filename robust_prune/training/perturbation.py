"""Adversarial weight perturbation (Wu et al., 2020, arXiv 2004.05884), in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TINY = 1e-12


@contextmanager
def perturbed_weights(model: nn.Module, gradients: Mapping[str, Tensor], size: float) -> Iterator[None]:
    """Every matrix and kernel moves uphill by `size` times its own norm, and comes back exactly.

    Norms and biases stay, as in the published method. The weights are restored from copies, not by subtraction, so that
    nothing is lost to rounding.

    Args:
        model: whose weights move.
        gradients: of the loss, by parameter name.
        size: relative length of the step, gamma in the paper, > 0.
    """
    named = dict(model.named_parameters())
    moved = [(named[name], gradient) for name, gradient in gradients.items() if named[name].ndim > 1]
    kept = [parameter.detach().clone() for parameter, _ in moved]
    try:
        with torch.no_grad():
            for parameter, gradient in moved:
                # A tensor, not a number: reading it would make the host wait for the device, once a layer.
                scale = size * parameter.norm().double() / gradient.norm().double().clamp_min(TINY)
                parameter.addcmul_(gradient, scale.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), before in zip(moved, kept, strict=True):
                parameter.copy_(before)
