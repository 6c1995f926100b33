"""Norms that users write: modules that hold parameters, one entry a channel, and compute statistics over the channels.

What a module does is found by running it on the input that it has in a pass, with some channels gone and with the same
channels zeroed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cutting import CHANNEL_LAYERS, cut_tensor, like, module_tensor, renewed

_CLOSE = {torch.float64: 1e-9}
"""Largest relative error between results that are equal, by data type."""


@dataclass(frozen=True)
class OwnNorm:
    """A module that computes statistics over its channels.

    Attributes:
        dims: dimension of the channels of each of its tensors, by name.
        channels: number of channels.
        scaled: names of a tensor and of float attributes whose product with C/C' makes a cut from C to C' channels
            equal to zeroing. A mean over channels, as in global response norm, becomes C/C' times as large by a cut. If
            there are none, cutting and zeroing differ, and the module is defined by its remaining channels.
    """

    dims: Mapping[str, int]
    channels: int
    scaled: tuple[str, ...] = ()


def find_own_norms(model: nn.Module, images: Tensor) -> dict[str, OwnNorm]:
    """Return the modules of `model` that compute statistics over their channels, by name.

    Args:
        model: in eval mode; it is not changed.
        images: a batch [N, C, H, W].
    """
    inputs: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(name, tuple(a.clone() if isinstance(a, Tensor) else a for a in args))

        return hook

    possible = {name: dims for name, module in model.named_modules() if (dims := _channel_dims(module))}
    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in possible]
    if not handles:
        return {}
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    found = ((name, _classify(model.get_submodule(name), possible[name], args)) for name, args in inputs.items())
    return {name: norm for name, norm in found if norm is not None}


def _channel_dims(module: nn.Module) -> dict[str, int]:
    """Return the dimension of the channels of each tensor of a module without others inside; none if they differ."""
    tensors = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.numel() > 1
    }
    if isinstance(module, CHANNEL_LAYERS) or next(module.children(), None) is not None or not module._parameters:
        return {}
    dims = {name: [d for d, size in enumerate(tensor.shape) if size > 1] for name, tensor in tensors.items()}
    alike = len({tensor.numel() for tensor in tensors.values()}) == 1
    return {name: found[0] for name, found in dims.items()} if alike and all(len(d) == 1 for d in dims.values()) else {}


@torch.no_grad()
def _classify(module: nn.Module, dims: Mapping[str, int], args: Sequence[Any]) -> OwnNorm | None:
    """Return what a module computes over its channels; None if nothing, or if it does not run on fewer of them."""
    name, dim = next(iter(dims.items()))
    size = module_tensor(module, name).shape[dim]
    index = list(range(0, size, 2))
    keep = [c for c in range(size) if c % 2]
    norm = OwnNorm(dims, size)
    cut = without(module, norm, index)
    zeroed = copy.deepcopy(module)
    for own, at in dims.items():
        tensor = module_tensor(zeroed, own)
        if isinstance(tensor, nn.Parameter):
            tensor.index_fill_(at, torch.tensor(index, device=tensor.device), 0.0)
    for x, side, result in _on_remaining(cut, args, keep, size):
        inputs = x.index_fill(side, torch.tensor(index, device=x.device), 0.0)
        wanted = zeroed(inputs, *args[1:])
        if not isinstance(wanted, Tensor) or wanted.dim() != result.dim():
            return None
        wanted = wanted.index_select(side, torch.tensor(keep, device=x.device))
        if _equal(result, wanted):
            return None
        for scaled in _scalings(module, dims):
            tried = without(module, norm, index)
            scale(tried, scaled, size / len(keep))
            same = next((found for _, at, found in _on_remaining(tried, args, keep, size) if at == side), None)
            if same is not None and _equal(same, wanted):
                return OwnNorm(dims, size, scaled)
        return norm
    return None


def _scalings(module: nn.Module, dims: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    # A constant that is added to the mean grows with it; without it the results differ in the last digits only.
    floats = [name for name, value in vars(module).items() if type(value) is float]
    for name in dims:
        if name in module._parameters:
            yield from ((name, other) for other in floats)
            yield (name,)


def scale(module: nn.Module, names: Sequence[str], factor: float) -> None:
    """Multiply tensors and float attributes of a module by a factor, replacing its tensors."""
    for name in names:
        if name in module._parameters:
            old = module.get_parameter(name)
            module._parameters[name] = like(old.detach() * factor, old)
        else:
            setattr(module, name, getattr(module, name) * factor)


def without(module: nn.Module, norm: OwnNorm, index: Sequence[int]) -> nn.Module:
    """Return a copy of a module without the channels `index`."""
    small = copy.deepcopy(module)
    for name, dim in norm.dims.items():
        cut_tensor(small, name, dim, list(index))
    return small


def of_remaining(module: nn.Module, norm: OwnNorm, index: Sequence[int]) -> Callable[..., Any]:
    """Return a forward function of a module that runs on its remaining channels and returns zeros for the others."""
    size, keep = norm.channels, sorted(set(range(norm.channels)) - set(index))
    small = without(module, norm, index)

    def forward(*args: Any) -> Tensor:
        for _, dim, result in _on_remaining(small, args, keep, size):
            whole = result.new_zeros([size if d == dim else n for d, n in enumerate(result.shape)])
            return whole.index_copy(dim, torch.tensor(keep, device=result.device), result)
        raise ValueError(f"a {type(module).__name__} does not run on fewer channels")

    return forward


def _on_remaining(
    small: nn.Module, args: Sequence[Any], keep: Sequence[int], size: int
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield the input, the dimension of its channels and the result of a cut module, where it runs on them."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.dim() < 2:
        return
    sizes = copy.copy(small)
    vars(sizes).update({name: renewed(value, {size: len(keep)}) for name, value in vars(small).items()})
    for dim in dict.fromkeys((1, x.dim() - 1)):
        if x.shape[dim] != size:
            continue
        kept = x.index_select(dim, torch.tensor(keep, device=x.device))
        for module in (small, sizes):
            try:
                result = module(kept, *args[1:])
            except Exception:  # the code of a user's module, on a width that it may not take
                continue
            if isinstance(result, Tensor) and result.shape == kept.shape:
                yield x, dim, result
                break


def _equal(found: Tensor, wanted: Tensor) -> bool:
    scale = float(wanted.abs().max())
    return bool(((found - wanted).abs().max() <= _CLOSE.get(found.dtype, 1e-4) * max(scale, 1e-12)).item())
