"""Physical removal of channels through torch-pruning's functions; positions refer to the dense model."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch_pruning import ops
from torch_pruning.pruner.function import PrunerBox

from .layernorm import OrderedLayerNormPruner
from .types import ChannelGroup, GroupSlice

CHANNEL_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.PReLU,
    nn.MultiheadAttention,
)
_LAYER_NORM = OrderedLayerNormPruner()
_BY_TYPE = (
    (nn.modules.batchnorm._BatchNorm, PrunerBox[ops.OPTYPE.BN]),
    (nn.LayerNorm, _LAYER_NORM),
    (nn.GroupNorm, PrunerBox[ops.OPTYPE.GN]),
    (nn.modules.instancenorm._InstanceNorm, PrunerBox[ops.OPTYPE.IN]),
    (nn.PReLU, PrunerBox[ops.OPTYPE.PRELU]),
    (nn.Linear, PrunerBox[ops.OPTYPE.LINEAR]),
    (nn.modules.conv._ConvNd, PrunerBox[ops.OPTYPE.CONV]),
)
Place = tuple[str, str, int]  # target, side, dimension


def is_depthwise(module: nn.Module) -> bool:
    """Return whether `module` is a depthwise convolution, whose inputs and outputs are cut together."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and 1 < module.in_channels == module.groups == module.out_channels
        and not module.transposed
    )


def gone_positions(group: ChannelGroup, removed: tuple[int, ...]) -> dict[Place, list[int]]:
    """Return, for each place that `group` cuts, the positions in the dense model of its channels `removed`."""
    removed_set = set(removed)
    found: dict[Place, list[int]] = {}
    for part in group.slices:
        positions = [i for i, r in zip(part.index, part.root, strict=True) if r in removed_set]
        found.setdefault((part.target, part.side, part.dim), []).extend(positions)
    return found


def place_size(model: nn.Module, part: GroupSlice) -> int:
    """Return the number of positions along the side of `part` in `model`."""
    if part.side == "param":
        return free_tensor(model, part.target).shape[part.dim]
    module: Any = model.get_submodule(part.target)
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if part.side == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if part.side == "out" else module.in_features
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    return next(p for t, p in _BY_TYPE if isinstance(module, t)).get_out_channels(module)


def free_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer of `model` by its qualified name."""
    owner, _, own = name.rpartition(".")
    return module_tensor(model.get_submodule(owner), own)


def module_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer of a module itself by its name."""
    found = module._parameters.get(name, module._buffers.get(name))
    if found is None:
        raise AttributeError(f"there is no parameter or buffer {name}")
    return found


@dataclass(frozen=True)
class Shortened:
    """What a place lost by a cut: its size before, and the positions that went, ascending."""

    size: int
    positions: tuple[int, ...]

    def segments(self, sizes: Sequence[int]) -> list[int] | None:
        """Return the new sizes of segments that fill the place, or None if they do not, or if one would be empty."""
        if sum(sizes) != self.size or min(sizes) < 1:
            return None
        ends = list(accumulate(sizes))
        lost = Counter(bisect_right(ends, position) for position in self.positions)
        left = [size - lost[number] for number, size in enumerate(sizes)]
        return left if min(left) > 0 else None


class Cutter:
    """Cuts one model group by group; all positions refer to the dense model.

    Args:
        model: the model, which is cut in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._alive: dict[Place, list[int]] = {}

    def cut(self, group: ChannelGroup, removed: tuple[int, ...]) -> list[Shortened]:
        """Remove channels `removed` of `group` from all of its layers; return what the places lost.

        Raises:
            ValueError: a layer cannot be cut, would lose all of its channels, or has lost some of them already.
        """
        shortened = []
        for place, positions in gone_positions(group, removed).items():
            if not positions:
                continue
            part = next(s for s in group.slices if (s.target, s.side, s.dim) == place)
            alive = self._alive.get(place) or list(range(place_size(self.model, part)))
            where = {dense: now for now, dense in enumerate(alive)}
            removed_set = set(positions)
            if not removed_set < where.keys():
                raise ValueError(f"{part.target}: all of its channels would go, or some are gone already")
            current = sorted(where[p] for p in removed_set)
            if part.side == "param":
                owner, _, own = part.target.rpartition(".")
                cut_tensor(self.model.get_submodule(owner), own, part.dim, current)
            else:
                cut_module(self.model.get_submodule(part.target), part.side, current)
            self._alive[place] = [dense for dense in alive if dense not in removed_set]
            shortened.append(Shortened(len(alive), tuple(current)))
        return shortened

    def snapshot(self) -> tuple[Any, ...]:
        """Return a state for `restore`. No tensor is copied, since cuts replace tensors and never write into them."""
        states = [
            (m, {**vars(m), "_parameters": dict(m._parameters), "_buffers": dict(m._buffers)})
            for m in self.model.modules()
        ]
        return states, dict(self._alive)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Undo all cuts since `snapshot`."""
        for module, state in snapshot[0]:
            vars(module).clear()
            vars(module).update(state, _parameters=dict(state["_parameters"]), _buffers=dict(state["_buffers"]))
        self._alive = dict(snapshot[1])


def cut_module(module: nn.Module, side: str, positions: list[int]) -> None:
    """Remove `positions` from one side of a layer, in place.

    `requires_grad` and the channels_last format of its parameters are kept.

    Args:
        module: the layer.
        side: ``out``, ``in`` or ``norm``, as in GroupSlice; ``norm`` for attention, which has one width.
        positions: positions in the layer as it is now, ascending.

    Raises:
        ValueError: the layer cannot be cut, or its groups would lose different numbers of channels.
    """
    before = dict(module.named_parameters(recurse=False))
    others = _others(module, side)
    depthwise = is_depthwise(module) and side == "out"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not depthwise:
        _cut_grouped(module, side, positions)
    elif isinstance(module, nn.GroupNorm):
        _cut_group_norm(module, positions)
    elif isinstance(module, nn.MultiheadAttention):
        _cut_attention(module, positions)
    elif depthwise:
        PrunerBox[ops.OPTYPE.DEPTHWISE_CONV].prune_out_channels(module, positions)
    else:
        pruner = next((p for t, p in _BY_TYPE if isinstance(module, t)), None)
        if pruner is None:
            raise ValueError(f"a {type(module).__name__} cannot be cut")
        cut: Any = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
        cut(module, positions)
    for name, old in before.items():
        new = module._parameters[name]
        if new is not None and new is not old:
            module._parameters[name] = like(new.detach(), old)
    for name, dim in others.items():
        cut_tensor(module, name, dim, positions)


def _others(module: nn.Module, side: str) -> dict[str, int]:
    """Return the tensors of a layer beside those of its base class that have a dimension of its channels, by name.

    Subclasses of convolutions hold a gain for each output, scores of the shape of the weight, or a mask.
    """
    weight = module._parameters.get("weight")
    if weight is None or (getattr(module, "groups", 1) != 1 and side == "in"):
        return {}
    if isinstance(module, nn.modules.conv._ConvNd):
        first = int(module.transposed)
        dim, size = (first, module.out_channels) if side == "out" else (1 - first, module.in_channels)
    elif isinstance(module, nn.Linear):
        dim, size = (0, module.out_features) if side == "out" else (1, module.in_features)
    else:
        dim, size = 0, len(weight)
    known = {"weight", "bias", "running_mean", "running_var"}
    found = {}
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or name in known:
            continue
        # A vector belongs to the outputs, whose number it shares.
        at = dim if tensor.dim() == weight.dim() else 0 if side != "in" else None
        if at is not None and at < tensor.dim() and tensor.shape[at] == size:
            found[name] = at
    return found


def cut_tensor(module: nn.Module, name: str, dim: int, positions: list[int]) -> None:
    """Remove positions of one dimension of a parameter or buffer of a module, in place."""
    old = module_tensor(module, name)
    keep = torch.tensor(sorted(set(range(old.shape[dim])) - set(positions)), device=old.device)
    new = old.detach().index_select(dim, keep)
    if isinstance(old, nn.Parameter):
        module._parameters[name] = like(new, old)
    else:
        module._buffers[name] = new


def _cut_attention(attention: nn.MultiheadAttention, positions: list[int]) -> None:
    """Cut the channels of queries, keys, values and results, of which each head has an equal part.

    Attention divides by the root of the number of channels of a head, so that fewer of them would sharpen the softmax;
    the weights of the queries make up for that.
    """
    size, heads = attention.embed_dim, attention.num_heads
    whole = (
        attention.in_proj_weight is not None and attention.bias_k is None and attention.kdim == attention.vdim == size
    )
    if not whole:
        raise ValueError("an attention with other widths for keys or values, or with a bias of the keys, cannot be cut")
    _require_equal_parts(size, heads, positions)
    keep = sorted(set(range(size)) - set(positions))
    rows, left, factor = [part * size + k for part in range(3) for k in keep], len(keep), math.sqrt(len(keep) / size)
    for name in ("in_proj_weight", "in_proj_bias"):
        old = attention._parameters[name]
        if old is not None:
            new = old.detach()[rows]
            new[:left] *= factor
            attention._parameters[name] = like(new[:, keep] if new.dim() == 2 else new, old)
    out = attention.out_proj
    for side in ("in", "out"):
        cut_module(out, side, positions)
    attention.embed_dim = attention.kdim = attention.vdim = left
    attention.head_dim = left // heads


def _cut_group_norm(norm: nn.GroupNorm, positions: list[int]) -> None:
    """Cut a group norm; torch-pruning's function needs a bias."""
    _require_equal_parts(norm.num_channels, norm.num_groups, positions)
    norm.num_channels -= len(positions)
    for name in ("weight", "bias"):
        if norm._parameters.get(name) is not None:
            cut_tensor(norm, name, 0, positions)


def like(new: torch.Tensor, old: torch.Tensor) -> nn.Parameter:
    """Return `new` as a parameter with the memory format and `requires_grad` of `old`."""
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _require_equal_parts(size: int, parts: int, positions: list[int]) -> None:
    if parts > 1:
        counts = [sum(p * parts // size == b for p in positions) for b in range(parts)]
        if len(set(counts)) != 1:
            raise ValueError(f"the {parts} parts of a grouped layer would lose different numbers of channels")


def _cut_grouped(conv: nn.modules.conv._ConvNd, side: str, positions: list[int]) -> None:
    """Cut a grouped convolution; torch-pruning's function would apply the cut of the first group to every group."""
    if conv.transposed:
        raise ValueError("a grouped transposed convolution cannot be cut")
    size = conv.out_channels if side == "out" else conv.in_channels
    _require_equal_parts(size, conv.groups, positions)
    keep = sorted(set(range(size)) - set(positions))
    if side == "out":
        PrunerBox[ops.OPTYPE.CONV].prune_out_channels(conv, positions)
        return
    part, outs = size // conv.groups, conv.out_channels // conv.groups
    weight = torch.cat(
        [
            conv.weight.detach()[g * outs : (g + 1) * outs, [k - g * part for k in keep if k // part == g]]
            for g in range(conv.groups)
        ]
    )
    conv.in_channels = len(keep)
    conv.weight = nn.Parameter(weight)


def scale_rows(module: nn.Module, rows: slice, factor: float) -> None:
    """Multiply output rows of a linear layer by `factor`, replacing its tensors."""
    for name in ("weight", "bias"):
        old = module._parameters.get(name)
        if old is not None:
            new = old.detach().clone()
            new[rows] *= factor
            module._parameters[name] = like(new, old)


def cut_copy(module: nn.Module, side: str, positions: list[int]) -> nn.Module:
    """Return a copy of one layer without `positions`; see `cut_module`."""
    fresh = copy.deepcopy(module)
    cut_module(fresh, side, positions)
    return fresh


def old_to_new_sizes(before: dict[Place, int], after: dict[Place, int], parts: int) -> dict[int, int]:
    """Return old and new channel counts that attributes may hold, of each place and of each of its `parts` parts."""
    sizes: dict[int, int] = {}
    for place, old in before.items():
        new = after[place]
        if old != new:
            sizes.setdefault(old, new)
            if parts > 1 and old % parts == new % parts == 0 and math.gcd(old, new) >= parts:
                sizes.setdefault(old // parts, new // parts)
    return sizes


def renewed(value: Any, sizes: Mapping[int, int]) -> Any:
    """Return the value of an attribute with old sizes replaced by new ones: integers, and lists and tuples of them."""
    if type(value) is int:
        return sizes.get(value, value)
    if type(value) in (tuple, list, torch.Size):
        return type(value)(renewed(v, sizes) if type(v) is int else v for v in value)
    return value
