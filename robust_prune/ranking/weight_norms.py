"""L2 norms of the weights that belong to a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..structure.types import ChannelGroup, GroupSlice
from .group_weights import per_channel, weight_of


def is_out(part: GroupSlice) -> bool:
    """Return whether a slice is on the output side of a layer."""
    return part.side == "out"


def is_any(part: GroupSlice) -> bool:
    """Return True for every slice."""
    return True


def weight_norm(model: nn.Module, group: ChannelGroup, keep: Callable[[GroupSlice], bool]) -> Tensor:
    """Return the L2 norm of the weights, without biases, of each channel over the slices that `keep` selects.

    Returns:
        float64 [channels] on the CPU.

    Raises:
        UsageError: no selected slice has weights.
    """
    squares = torch.zeros(group.channels, dtype=torch.float64)
    seen = False
    for part in group.slices:
        weight = weight_of(model, part)
        if keep(part) and weight is not None:
            squares += per_channel(model, part, weight.detach().double().square(), group.channels)
            seen = True
    if not seen:
        raise UsageError(f"group {group.name!r} has no convolution or linear layer whose weights could be scored")
    return squares.sqrt()
