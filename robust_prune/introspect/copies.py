"""Deep copies of modules that cannot always be copied directly."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from .modes import kept_modes

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """Return a deep copy of `model`, which is not changed.

    Some models (LeViT) cache a tensor with its graph in eval mode, which cannot be copied; train mode clears it.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        with kept_modes(model):
            model.train()
            found = copy.deepcopy(model)
    for there, here in zip(found.modules(), model.modules(), strict=True):
        there.training = here.training
    return found
