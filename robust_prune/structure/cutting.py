"""The physical cut: positions leave tensors, through torch-pruning's functions, in coordinates of the dense model."""

from __future__ import annotations

import copy
import math
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
    """Whether each input channel of `module` has exactly one filter, so that both sides are cut together."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and 1 < module.in_channels == module.groups == module.out_channels
        and not module.transposed
    )


def gone_positions(group: ChannelGroup, removed: tuple[int, ...]) -> dict[Place, list[int]]:
    """For each place that `group` cuts, the positions (of the dense model) that go with the channels `removed`."""
    removed_set = set(removed)
    found: dict[Place, list[int]] = {}
    for part in group.slices:
        positions = [i for i, r in zip(part.index, part.root, strict=True) if r in removed_set]
        found.setdefault((part.target, part.side, part.dim), []).extend(positions)
    return found


def place_size(model: nn.Module, part: GroupSlice) -> int:
    """Positions that `part`'s place has in `model`."""
    if part.side == "param":
        return model.get_parameter(part.target).shape[part.dim]
    module: Any = model.get_submodule(part.target)
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if part.side == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if part.side == "out" else module.in_features
    return next(p for t, p in _BY_TYPE if isinstance(module, t)).get_out_channels(module)


class Cutter:
    """Cuts one model, group after group; every index is a position of the dense model.

    Args:
        model: cut in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._alive: dict[Place, list[int]] = {}

    def cut(self, group: ChannelGroup, removed: tuple[int, ...]) -> None:
        """Remove channels `removed` of `group` from all of its places.

        Raises:
            ValueError: a layer of a kind, or in a state, that cannot be cut.
        """
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
                _cut_parameter(self.model, part.target, part.dim, current)
            else:
                cut_module(self.model.get_submodule(part.target), part.side, current)
            self._alive[place] = [dense for dense in alive if dense not in removed_set]

    def snapshot(self) -> tuple[Any, ...]:
        """A cheap state for `restore`: cuts replace tensors, they never write into them."""
        states = [
            (m, {**vars(m), "_parameters": dict(m._parameters), "_buffers": dict(m._buffers)})
            for m in self.model.modules()
        ]
        return states, dict(self._alive)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Undo everything since `snapshot`."""
        for module, state in snapshot[0]:
            vars(module).clear()
            vars(module).update(state, _parameters=dict(state["_parameters"]), _buffers=dict(state["_buffers"]))
        self._alive = dict(snapshot[1])


def cut_module(module: nn.Module, side: str, positions: list[int]) -> None:
    """Remove `positions` (current coordinates, ascending) from one side of a layer, in place.

    `requires_grad` and the channels_last format of its parameters stay.

    Raises:
        ValueError: a kind of layer that cannot be cut, or unequal cuts of the parts of a grouped one.
    """
    before = dict(module.named_parameters(recurse=False))
    depthwise = is_depthwise(module) and side == "out"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not depthwise:
        _cut_grouped(module, side, positions)
    elif depthwise:
        PrunerBox[ops.OPTYPE.DEPTHWISE_CONV].prune_out_channels(module, positions)
    else:
        pruner = next((p for t, p in _BY_TYPE if isinstance(module, t)), None)
        if pruner is None:
            raise ValueError(f"a {type(module).__name__} cannot be cut")
        _require_equal_parts(getattr(module, "num_channels", 0), getattr(module, "num_groups", 1), positions)
        cut: Any = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
        cut(module, positions)
    for name, old in before.items():
        new = module._parameters[name]
        if new is not None and new is not old:
            module._parameters[name] = like(new.detach(), old)


def like(new: torch.Tensor, old: torch.Tensor) -> nn.Parameter:
    """`new` as a parameter with the memory format and `requires_grad` of `old`."""
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _cut_parameter(model: nn.Module, name: str, dim: int, positions: list[int]) -> None:
    owner_name, _, own_name = name.rpartition(".")
    owner, old = model.get_submodule(owner_name), model.get_parameter(name)
    keep = torch.tensor(sorted(set(range(old.shape[dim])) - set(positions)), device=old.device)
    owner._parameters[own_name] = like(old.detach().index_select(dim, keep), old)


def _require_equal_parts(size: int, parts: int, positions: list[int]) -> None:
    if parts > 1:
        counts = [sum(p * parts // size == b for p in positions) for b in range(parts)]
        if len(set(counts)) != 1:
            raise ValueError(f"the {parts} parts of a grouped layer would lose different numbers of channels")


def _cut_grouped(conv: nn.modules.conv._ConvNd, side: str, positions: list[int]) -> None:
    """Grouped convolution; torch-pruning's function applies the first part's cut to every part."""
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
    """Multiply the given output rows of a linear layer by `factor`, by replacing its tensors."""
    for name in ("weight", "bias"):
        old = module._parameters.get(name)
        if old is not None:
            new = old.detach().clone()
            new[rows] *= factor
            module._parameters[name] = like(new, old)


def cut_copy(module: nn.Module, side: str, positions: list[int]) -> nn.Module:
    """A cut copy of one layer."""
    fresh = copy.deepcopy(module)
    cut_module(fresh, side, positions)
    return fresh


def old_to_new_sizes(before: dict[Place, int], after: dict[Place, int], parts: int) -> dict[int, int]:
    """Channel counts that a cut changed, as numbers an attribute may hold: whole places and each of `parts` parts."""
    sizes: dict[int, int] = {}
    for place, old in before.items():
        new = after[place]
        if old != new:
            sizes.setdefault(old, new)
            if parts > 1 and old % parts == new % parts == 0 and math.gcd(old, new) >= parts:
                sizes.setdefault(old // parts, new // parts)
    return sizes
