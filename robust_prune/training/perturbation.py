"""Adversarial weight perturbation (AWP; Wu et al., 2020, arXiv 2004.05884), in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TINY = 1e-12


@contextmanager
def perturbed_weights(model: nn.Module, gradients: Mapping[str, Tensor], size: float) -> Iterator[None]:
    """Move every matrix and kernel along its gradient by `size` times its norm; restore all exactly on exit.

    Norm layers and biases are not perturbed, as in the published method. Weights are restored from copies, not by
    subtraction, so that no rounding error remains.

    Args:
        model: the model to perturb.
        gradients: gradients of the loss by parameter name.
        size: size of the perturbation relative to the weight's norm (gamma in the paper), > 0.
    """
    named = dict(model.named_parameters())
    moved = [(named[name], gradient) for name, gradient in gradients.items() if named[name].ndim > 1]
    kept = [parameter.detach().clone() for parameter, _ in moved]
    try:
        with torch.no_grad():
            for parameter, gradient in moved:
                # A tensor and not a float, since reading it would synchronise the device once for every layer.
                scale = size * parameter.norm().double() / gradient.norm().double().clamp_min(TINY)
                parameter.addcmul_(gradient, scale.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), before in zip(moved, kept, strict=True):
                parameter.copy_(before)
