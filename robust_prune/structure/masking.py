"""Masked model: the dense model with channels set to zero, which a correct cut must equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .cutting import Place, cut_copy

_STATISTICS = (nn.LayerNorm, nn.GroupNorm)


@contextmanager
def masked(model: nn.Module, removed: Mapping[Place, Iterable[int]]) -> Iterator[nn.Module]:
    """Set the given positions of `model` to zero inside the ``with`` block and restore them bit for bit on exit.

    Weights, biases and free parameters are zeroed. Layer and group norms compute statistics over channels, in which
    zeroed channels would still count. Such a norm is replaced by one that normalises the remaining channels alone and
    returns zeros for the others.

    Args:
        model: the dense model; no other thread may use it inside the block.
        removed: for each place (target, side, dimension) the positions to set to zero.

    Yields:
        The same model.
    """
    undo: list[tuple[Tensor, Tensor]] = []
    norms: list[nn.Module] = []
    try:
        with torch.no_grad():
            for (target, side, dim), positions in removed.items():
                index = sorted(positions)
                if side == "param":
                    _zero(model.get_parameter(target), dim, index, undo)
                    continue
                module: Any = model.get_submodule(target)
                if isinstance(module, _STATISTICS):
                    norms.append(module)
                    vars(module)["forward"] = _remaining_only(module, index)
                elif side == "in":
                    _zero_inputs(module, index, undo)
                else:
                    transposed = getattr(module, "transposed", False)
                    _zero(module.weight, 1 if transposed else 0, index, undo)
                    _zero(getattr(module, "bias", None), 0, index, undo)
        yield model
    finally:
        with torch.no_grad():
            for tensor, old in reversed(undo):
                tensor.copy_(old)
        for module in norms:
            del vars(module)["forward"]


def _zero(tensor: Tensor | None, dim: int, index: list[int], undo: list[tuple[Tensor, Tensor]]) -> None:
    if tensor is not None:
        undo.append((tensor, tensor.clone()))
        tensor.index_fill_(dim, torch.tensor(index, device=tensor.device), 0.0)


def _zero_inputs(module: Any, index: list[int], undo: list[tuple[Tensor, Tensor]]) -> None:
    groups = getattr(module, "groups", 1)
    if groups == 1:
        _zero(module.weight, 0 if getattr(module, "transposed", False) else 1, index, undo)
        return
    undo.append((module.weight, module.weight.clone()))
    ins, outs = module.in_channels // groups, module.out_channels // groups
    for i in index:
        part = i // ins
        module.weight[part * outs : (part + 1) * outs, i % ins] = 0.0


def _remaining_only(norm: Any, index: list[int]) -> Any:
    """Return a forward function of `norm` over the remaining channels."""
    size = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[-1]
    keep = sorted(set(range(size)) - set(index))
    if not keep:
        return lambda x, *_, **__: torch.zeros_like(x)
    small = cut_copy(norm, "norm", index)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = _channel_dim(norm, x)
        kept = torch.tensor(keep, device=x.device)
        result = small(x.index_select(dim, kept), *args, **kwargs)
        return torch.zeros_like(x).index_copy(dim, kept, result)

    return forward


def _channel_dim(norm: Any, x: Tensor) -> int:
    """Return the channel dimension of `x`: 1 for group norm and two-dimensional layer norms, else the last."""
    if isinstance(norm, nn.GroupNorm):
        return 1
    size = norm.normalized_shape[-1]
    own_forward = type(norm).forward is not nn.LayerNorm.forward
    first = own_forward and x.dim() == 4 and x.shape[1] == size
    return 1 if first and (x.shape[-1] != size or "2d" in type(norm).__name__.lower()) else x.dim() - 1
