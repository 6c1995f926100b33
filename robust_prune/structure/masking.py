"""Masked model: the dense model with channels set to zero, which a correct cut must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .cutting import Place, cut_copy, cut_module, free_tensor, is_depthwise
from .own_norms import OwnNorm, of_remaining

_ConvNd = nn.modules.conv._ConvNd

_NORMS = (nn.LayerNorm, nn.GroupNorm)
_PLAIN = {
    kind.forward
    for kind in (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    )
}  # fmt: skip


@contextmanager
def masked(
    model: nn.Module, removed: Mapping[Place, Iterable[int]], norms: Mapping[str, OwnNorm] | None = None
) -> Iterator[nn.Module]:
    """Set the given positions of `model` to zero inside the ``with`` block and restore them bit for bit on exit.

    Weights, biases and free parameters are zeroed. Layer and group norms compute statistics over channels, in which
    zeroed channels would still count, as may norms that users write and subclasses of convolutions that standardise
    their weights. Such a module is replaced by one that runs on the remaining channels alone and returns zeros for the
    others.

    Args:
        model: the dense model; no other thread may use it inside the block.
        removed: for each place (target, side, dimension) the positions to set to zero.
        norms: norms that users write, by name.

    Yields:
        The same model.
    """
    undo: list[tuple[Tensor, Tensor]] = []
    replaced: list[nn.Module] = []
    # Torch's fast path of encoder layers reads weights and calls no module.
    fast = torch.backends.mha.get_fastpath_enabled()
    lost = {place: sorted(positions) for place, positions in removed.items()}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            for small, forward, places in _smaller(model, lost, norms or {}):
                vars(small)["forward"] = forward
                replaced.append(small)
                lost = {place: index for place, index in lost.items() if place not in places}
            for (target, side, dim), index in lost.items():
                if side == "param":
                    tensor = free_tensor(model, target)
                    if isinstance(tensor, nn.Parameter):  # a zero in a buffer of deviations would be divided by
                        _zero(tensor, dim, index, undo)
                    continue
                module: Any = model.get_submodule(target)
                if isinstance(module, nn.MultiheadAttention):
                    _zero_attention(module, index, undo)
                elif side == "in":
                    _zero_inputs(module, index, undo)
                else:
                    transposed = getattr(module, "transposed", False)
                    _zero(module.weight, 1 if transposed else 0, index, undo)
                    _zero(getattr(module, "bias", None), 0, index, undo)
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for tensor, old in reversed(undo):
                tensor.copy_(old)
        for changed in replaced:
            vars(changed).pop("forward", None)


def _smaller(
    model: nn.Module, lost: Mapping[Place, list[int]], norms: Mapping[str, OwnNorm]
) -> Iterator[tuple[nn.Module, Callable[..., Tensor], set[Place]]]:
    """Yield modules that run on their remaining channels, with that forward function and places not to be zeroed."""
    own: dict[str, set[Place]] = {}
    for place in lost:
        target, side, _ = place
        if side == "param":
            own.setdefault(target.rpartition(".")[0], set()).add(place)
            continue
        module: Any = model.get_submodule(target)
        if isinstance(module, _NORMS):
            yield module, _norm_of_remaining(module, lost[place]), {place}
        elif isinstance(module, (_ConvNd, nn.Linear)) and type(module).forward not in _PLAIN:
            own.setdefault(target, set()).add(place)
    for name, places in own.items():
        module = model.get_submodule(name)
        norm, index = norms.get(name), lost[next(iter(places))]
        if isinstance(module, (_ConvNd, nn.Linear)):
            gone = {side: lost[place] for place in places if (side := place[1]) != "param"}
            if gone and all(len(index) < _width(module, side) for side, index in gone.items()):
                yield module, _layer_of_remaining(module, gone), places
        elif norm and not norm.scaled and len(index) < norm.channels and all(lost[place] == index for place in places):
            yield module, of_remaining(module, norm, index), places


def _width(layer: Any, side: str) -> int:
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    return int(getattr(layer, names[side == "out"]))


def _layer_of_remaining(layer: Any, gone: Mapping[str, list[int]]) -> Callable[..., Tensor]:
    """Return a forward function of a convolution or linear layer over its remaining inputs and outputs.

    The other outputs are zero. The code of a subclass may compute statistics over all weights.
    """
    small = copy.deepcopy(layer)
    keep = {}
    for side, index in gone.items():
        keep[side] = sorted(set(range(_width(layer, side))) - set(index))
        cut_module(small, side, index)
    if is_depthwise(layer):
        keep["in"] = keep["out"]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim() + 1
        kept = {side: torch.tensor(index, device=x.device) for side, index in keep.items()}
        result: Tensor = small(x.index_select(dim, kept["in"]) if "in" in kept else x, *args, **kwargs)
        if "out" not in kept:
            return result
        sizes = [_width(layer, "out") if d == dim else n for d, n in enumerate(result.shape)]
        return result.new_zeros(sizes).index_copy(dim, kept["out"], result)

    return forward


def _norm_of_remaining(norm: Any, index: list[int]) -> Callable[..., Tensor]:
    """Return a forward function of a layer or group norm over the remaining channels."""
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


def _zero(tensor: Tensor | None, dim: int, index: list[int], undo: list[tuple[Tensor, Tensor]]) -> None:
    if tensor is not None and index:
        undo.append((tensor, tensor.clone()))
        tensor.index_fill_(dim, torch.tensor(index, device=tensor.device), 0.0)


def _zero_attention(attention: nn.MultiheadAttention, index: list[int], undo: list[tuple[Tensor, Tensor]]) -> None:
    rows = [part * attention.embed_dim + i for part in range(3) for i in index]
    for tensor, dim, positions in (
        (attention.in_proj_weight, 0, rows), (attention.in_proj_weight, 1, index), (attention.in_proj_bias, 0, rows),
        (attention.out_proj.weight, 0, index), (attention.out_proj.weight, 1, index),
        (attention.out_proj.bias, 0, index),
    ):  # fmt: skip
        _zero(tensor, dim, positions, undo)


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


def _channel_dim(norm: Any, x: Tensor) -> int:
    """Return the channel dimension of `x`: 1 for group norm and two-dimensional layer norms, else the last."""
    if isinstance(norm, nn.GroupNorm):
        return 1
    size = norm.normalized_shape[-1]
    own_forward = type(norm).forward is not nn.LayerNorm.forward
    first = own_forward and x.dim() == 4 and x.shape[1] == size
    return 1 if first and (x.shape[-1] != size or "2d" in type(norm).__name__.lower()) else x.dim() - 1
