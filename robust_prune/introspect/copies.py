"""Copies of modules that cannot always be copied as they are."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from .modes import kept_modes

M = TypeVar("M", bound=nn.Module)


def copied(model: M) -> M:
    """A deep copy of `model`, which stays as it is.

    LeViT and its like keep a tensor with a graph in eval mode, which cannot be copied; a switch to train mode drops it.
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
