"""Deep copies of modules that cannot always be copied directly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import UsageError
from .modes import kept_modes

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """Return a deep copy of `model`, which is not changed.

    Some models keep a tensor of their last pass with its graph, which cannot be copied. Train mode clears what is
    cached for eval mode (LeViT); what is left is detached in the copy.

    Raises:
        UsageError: the model holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception:
        with kept_modes(model):
            model.train()
            found = _copied_or_refused(model)
    for there, here in zip(found.modules(), model.modules(), strict=True):
        there.training = here.training
    return found


def _copied_or_refused(model: M) -> M:
    try:
        return _detached_copy(model)
    except Exception as error:  # an attribute may be of any type
        named = reversed(list(model.named_modules()))
        guilty = next((f"{name} ({type(m).__name__})" for name, m in named if name and not _copies(m)), "")
        said = " ".join(str(error).split())[:120].rstrip(".")
        raise UsageError(
            f"the model cannot be copied, for what {guilty or type(model).__name__} holds: {said}. Keep such objects "
            "out of the model."
        ) from error


def _detached_copy(model: M) -> M:
    kept = (t for module in model.modules() for t in _tensors(vars(module)) if not t.is_leaf)
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept})


def _copies(module: nn.Module) -> bool:
    try:
        _detached_copy(module)
    except Exception:
        return False
    return True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
