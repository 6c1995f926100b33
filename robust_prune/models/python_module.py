"""Torch modules from Python as models of this package."""

from __future__ import annotations

import torch
from torch import nn

from ..data.base import DataBundle
from ..errors import UsageError
from ..introspect.modes import eval_mode
from . import registry
from .artifact import Model
from .normalization import NormalizedClassifier


def as_model(module: nn.Module, data: DataBundle) -> Model:
    """Return `module` as a `Model`, whose architecture is registered until the process ends (`registry.remember`).

    Args:
        module: maps [0, 1] images [N, C, H, W] to logits [N, K]; any normalization is inside.
        data: data set, with the size of the images and the names of the classes.

    Raises:
        UsageError: the module has no parameters, does not run on such images, or has another number of logits.
    """
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise UsageError(f"{type(module).__name__} has no parameters; there is nothing to prune.")
    size = "x".join(map(str, data.input_size))
    image = torch.zeros(1, *data.input_size, device=parameter.device, dtype=parameter.dtype)
    try:
        with eval_mode(module), torch.no_grad():
            logits = module(image)
    except Exception as error:  # a module may raise any error on images of another size
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(f"{type(module).__name__} cannot run on {size} images of {data.name}: {said}") from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, data.num_classes):
        raise UsageError(
            f"{type(module).__name__} must map [1, {size}] images to logits (1, {data.num_classes}) for {data.name}, "
            f"but gave {shape}."
        )
    channels = data.input_size[0]
    spec = registry.make_spec(
        registry.remember(module),
        num_classes=data.num_classes,
        input_size=data.input_size,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        class_names=data.class_names,
    )
    return Model(NormalizedClassifier(module, spec.mean, spec.std).eval(), spec)
