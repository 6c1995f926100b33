"""Architectures for 32x32 images: ``cifar/<name>``, with an optional width factor as in ``cifar/resnet20_x2``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ...errors import UsageError
from ...suggest import did_you_mean
from .mobilevit import mobilevit_xs
from .preact import preact_resnet18
from .resnet import resnet18, resnet20, resnet32, resnet34
from .vgg import vgg16_bn
from .wideresnet import WideResNet

CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mobilevit_xs": mobilevit_xs,
    "preact_resnet18": preact_resnet18,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet34": resnet34,
    "vgg16_bn": vgg16_bn,
}
"""Constructors by name; each takes ``num_classes``, ``in_chans`` and ``width``."""

WIDE_RESNETS = ("wideresnet_16_4", "wideresnet_28_10", "wideresnet_34_10", "wideresnet_70_16")
"""Common members of the family, which has any depth 6n + 4 and any width."""

_WIDE = re.compile(r"wideresnet_(\d+)_(\d+(?:\.\d+)?)")
_WIDTH = re.compile(r"(.+)_x(\d+(?:\.\d+)?)")


def names() -> list[str]:
    """Return all names that `create` knows, without width factors."""
    return sorted([*CIFAR_MODELS, *WIDE_RESNETS])


def create(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Build ``cifar/<name>`` with fresh weights.

    Args:
        name: a key of `CIFAR_MODELS`, optionally followed by ``_x<width factor>``, or ``wideresnet_<depth>_<width>``.
        num_classes: number of logits.
        kwargs: further arguments of the constructor, e.g. ``in_chans``.

    Raises:
        UsageError: the name is unknown, or the constructor does not accept an argument.
    """
    constructor, fixed = _parse(name)
    known = inspect.signature(constructor).parameters
    for key in kwargs:
        if key not in known or key in fixed:
            free = ", ".join(argument for argument in known if argument not in fixed)
            raise UsageError(f"cifar/{name} takes no argument {key!r}; it takes {free}")
    return constructor(num_classes=num_classes, **fixed, **kwargs)


def check_name(name: str) -> None:
    """Raise UsageError, with similar names, if `create` does not know `name`."""
    _parse(name)


def _parse(name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    wide = _WIDE.fullmatch(name)
    if wide:
        return WideResNet, {"depth": int(wide[1]), "widen_factor": float(wide[2])}
    scaled = _WIDTH.fullmatch(name)
    base = scaled[1] if scaled else name
    if base not in CIFAR_MODELS:
        raise UsageError(
            f"unknown architecture cifar/{name}.{did_you_mean(base, names(), 'cifar/')} "
            f"Known: {', '.join(names())}; append _x2 for double width."
        )
    if scaled and not float(scaled[2]):
        raise UsageError(f"the width factor of cifar/{name} must be above 0")
    return CIFAR_MODELS[base], {"width": float(scaled[2])} if scaled else {}
