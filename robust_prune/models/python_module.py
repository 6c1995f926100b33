"""Torch modules from Python as models of this package."""

from __future__ import annotations

import torch
from torch import nn

from ..data.base import DataBundle
from ..errors import UsageError
from ..introspect.modes import eval_mode
from ..introspect.obstacles import check_tensors
from ..printable import one_line
from . import registry
from .artifact import Model
from .normalization import NormalizedClassifier, no_normalization, parse
from .normalization_choice import Choice, choose
from .wrappers import unwrap


def as_model(module: nn.Module, data: DataBundle, normalization: str | None = None) -> Model:
    """Return `module` as a `Model`, whose architecture is registered until the process ends (`registry.remember`).

    Args:
        module: maps images [N, C, H, W] to logits [N, K].
        data: data set, with the size of the images and the names of the classes.
        normalization: normalization of the images that the module expects, see `normalization.parse`; ``auto`` measures
            it. By default none, since a module takes [0, 1] images or normalizes them itself, which is measured too.

    Raises:
        UsageError: the module has no parameters or some that are not float32 numbers in memory, cannot be copied, does
            not run on such images, has another number of logits, or is more accurate on training images with another
            normalization and none was named.
    """
    module = unwrap(module)
    check_tensors(module, lazy=True)
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise UsageError(f"{type(module).__name__} has no parameters; there is nothing to prune.")
    size = "x".join(map(str, data.input_size))
    image = torch.zeros(1, *data.input_size, device=parameter.device, dtype=parameter.dtype)
    try:
        with eval_mode(module), torch.no_grad():
            logits = module(image)
    except Exception as error:  # a module may raise any error on images of another size
        said = one_line(error, 200)
        raise UsageError(f"{type(module).__name__} cannot run on {size} images of {data.name}: {said}") from error
    check_tensors(module)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, data.num_classes):
        raise UsageError(
            f"{type(module).__name__} must map [1, {size}] images to logits (1, {data.num_classes}) for {data.name}, "
            f"but gave {shape}."
        )
    choice = _normalization(module, data, normalization)
    spec = registry.make_spec(
        registry.remember(module),
        num_classes=data.num_classes,
        input_size=data.input_size,
        mean=choice.normalization.mean,
        std=choice.normalization.std,
        class_names=data.class_names,
    )
    notes = [f"Normalization: {choice.normalization} ({choice.reason})."]
    model = NormalizedClassifier(module, spec.mean, spec.std).to(parameter.device)
    return Model(model.eval(), spec, None, {"notes": notes})


def _normalization(module: nn.Module, data: DataBundle, wanted: str | None) -> Choice:
    given = parse(wanted, data) if wanted is not None else None
    if given is not None:
        return Choice(given, "as asked for")
    none = no_normalization(data.input_size[0])
    choice = choose(module, data, none, "a module takes images in [0, 1]")
    if wanted is not None or choice.normalization == none:
        return choice
    raise UsageError(
        f"{type(module).__name__} was given as a model of images in [0, 1], but fits normalization "
        f"{choice.normalization.name} better ({choice.reason}). Open it with "
        f"robust_prune.load(module, data=data, normalization={choice.normalization.name!r}), or 'none' to say that it "
        "is right as it is."
    )
