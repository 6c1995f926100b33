"""Dependency graph: torch-pruning's tracing and index mappings, with a propagation that is bounded and terminates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency import DependencyGraph, index_mapping, shape_infer

from ..errors import UsageError
from .layernorm import OrderedLayerNormPruner
from .types import GroupSlice, Side

# torch-pruning's shape inference raises these on operations that it does not know.
_MAPPING_ERRORS = (
    ArithmeticError,
    TypeError,
    AttributeError,
    LookupError,
    UnboundLocalError,
    ValueError,
    RecursionError,
)
_UPDATES = {
    ops.OPTYPE.CONCAT: index_mapping.update_concat_index_mapping,
    ops.OPTYPE.SPLIT: index_mapping.update_split_index_mapping,
    ops.OPTYPE.RESHAPE: index_mapping.update_reshape_index_mapping,
    ops.OPTYPE.UNBIND: index_mapping.update_unbind_index_mapping,
    ops.OPTYPE.EXPAND: index_mapping.update_expand_index_mapping,
    ops.OPTYPE.SLICE: index_mapping.update_slice_index_mapping,
}
_ONE_WIDTH = {ops.OPTYPE.BN, ops.OPTYPE.LN, ops.OPTYPE.GN, ops.OPTYPE.IN, ops.OPTYPE.PRELU, ops.OPTYPE.MHA}
_OPAQUE = {ops.OPTYPE.LSTM, ops.OPTYPE.EMBED, ops.OPTYPE.CUSTOMIZED}
_STEP_LIMIT = 20_000


class BrokenMapping(Exception):
    """Raised where channels cannot be followed through the graph; the message names the layer."""


class BoundedGraph(DependencyGraph):
    """torch-pruning's dependency graph with a correct LayerNorm function, tolerant index mappings and known outputs.

    Attributes:
        outputs: nodes whose values are outputs of the model.
        widest: largest size of any dimension of any weight; an index above it is invalid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.widest = 0
        # REGISTERED_PRUNERS is a copy owned by this graph, so other users of torch-pruning see no change.
        self.REGISTERED_PRUNERS[ops.OPTYPE.LN] = OrderedLayerNormPruner()
        pruners = [p for p in self.REGISTERED_PRUNERS.values() if p is not None]
        self._in_channel_pruning_fn = {p.prune_in_channels for p in pruners}
        self._out_channel_pruning_fn = {p.prune_out_channels for p in pruners}

    def build(
        self, model: nn.Module, example: Tensor, more: Callable[[nn.Module], list[Tensor]] = lambda model: []
    ) -> BoundedGraph:
        """Trace `model` on one image [1, C, H, W]; it is in eval mode and every parameter requires gradients.

        Args:
            model: the model.
            example: the image.
            more: makes further passes, whose operations are traced too, and returns their logits.

        Returns:
            The graph itself.

        Raises:
            UsageError: autograd cannot trace the model's operations.
        """
        self.verbose = False
        self.model = model
        self.ignored_params: list[nn.Parameter] = []
        self.widest = max((size for p in model.parameters() for size in p.shape), default=1)
        self._module2name = {module: name for name, module in model.named_modules()}
        self._param_to_name, self.unwrapped_parameters = self._detect_unwrapped_parameters(None)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.module2node = self._trace(model, example, lambda m, x: [m(x), *more(m)], output_transform=None)
                self._build_dependency(self.module2node)
            except Exception as error:
                raise UsageError(
                    f"the graph of {type(model).__name__} could not be traced: {type(error).__name__}: {error}. "
                    "Its logits must depend on its weights through autograd: look for torch.no_grad or detach."
                ) from error
            # Groups that cross an unknown size or mapping fail their proof later.
            with suppress(*_MAPPING_ERRORS):
                shape_infer.init_shape_information(self)
            for node in self.module2node.values():
                with suppress(*_MAPPING_ERRORS):
                    _UPDATES.get(node.type, lambda graph, node: None)(self, node)
        return self

    def _trace_computational_graph(  # type: ignore[no-untyped-def]
        self, module2node, output, gradfn2module, reused, visited
    ) -> None:
        if output.grad_fn is None:
            raise ValueError("its output carries no gradient")
        super()._trace_computational_graph(module2node, output, gradfn2module, reused, visited=visited)
        self.outputs.append(module2node[gradfn2module[output.grad_fn]])


@dataclass(frozen=True)
class Coupling:
    """All positions that must be removed together with output channels of one module.

    Attributes:
        channels: number of channels that can be removed independently.
        slices: as in ChannelGroup; the root's slice is first.
        reaches_output: whether some of the channels are outputs of the model.
    """

    channels: int
    slices: tuple[GroupSlice, ...]
    reaches_output: bool


def couple(graph: BoundedGraph, module: nn.Module, channels: Iterable[int]) -> Coupling:
    """Follow output channels of `module` through the graph until no new positions are reached.

    Channels that reach the same position of another layer (the halves of a gate, a residual sum) cannot be removed
    separately; they become one channel of the coupling.

    Args:
        graph: a built graph.
        module: a convolution or linear layer of its model.
        channels: output channels to follow, ascending.

    Raises:
        BrokenMapping: an index mapping fails or points outside its layer, the channels reach a layer that cannot be
            cut, or propagation does not end within 20,000 steps.
    """
    root = graph.module2node[module]
    handler = graph.get_pruner_of_module(module).prune_out_channels
    start = list(channels)
    classes = _Classes(start)
    seen: dict[tuple[Any, Any], dict[int, int]] = {(root, handler): {c: c for c in start}}
    work = [(root, handler, [_helpers._HybridIndex(c, c) for c in start])]
    steps = 0
    while work:
        node, fn, indices = work.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(fn):
                continue
            steps += 1
            if steps > _STEP_LIMIT:
                raise BrokenMapping(f"propagation from it did not end within {_STEP_LIMIT} steps")
            arrived = _mapped(dependency, indices)
            if not arrived:
                continue
            _check_range(graph, dependency, arrived)
            known = seen.setdefault((dependency.target, dependency.handler), {})
            fresh = []
            for item in arrived:
                if item.root_idx is None:
                    raise BrokenMapping(f"the origin of a channel is lost at {_label(dependency.target)}")
                if item.idx in known:
                    classes.join(known[item.idx], item.root_idx)
                else:
                    known[item.idx] = item.root_idx
                    fresh.append(item)
            if fresh:
                work.append((dependency.target, dependency.handler, fresh))
    number = classes.numbered()
    slices = [s for (node, fn), found in seen.items() if (s := _slice(graph, node, fn, found, number)) is not None]
    reaches_output = any(n in graph.outputs and _changes_value(graph, n, fn) for n, fn in seen)
    return Coupling(max(number.values()) + 1, tuple(slices), reaches_output)


class _Classes:
    """Union-find over root channels; the smallest member represents its class."""

    def __init__(self, members: list[int]) -> None:
        self._parent = {m: m for m in members}

    def find(self, member: int) -> int:
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        self._parent[b] = a

    def numbered(self) -> dict[int, int]:
        """Return each member's class number; classes are numbered from 0 in the order of their smallest members."""
        order = {r: i for i, r in enumerate(sorted({self.find(m) for m in self._parent}))}
        return {m: order[self.find(m)] for m in self._parent}


def _mapped(dependency: Any, indices: list[Any]) -> list[Any]:
    for mapping in dependency.index_mapping:
        if mapping is not None:
            try:
                indices = mapping(indices)
            except _MAPPING_ERRORS as error:
                raise BrokenMapping(
                    f"{type(error).__name__} in the index mapping at {_label(dependency.target)}"
                ) from None
    return indices


def _check_range(graph: BoundedGraph, dependency: Any, arrived: list[Any]) -> None:
    node = dependency.target
    out = graph.is_out_channel_pruning_fn(dependency.handler)
    size = graph.get_out_channels(node) if out else graph.get_in_channels(node)
    if node.type == ops.OPTYPE.OUTPUT or size is None:
        size = graph.widest  # operations without a channel count: only an invalid mapping exceeds the widest layer
    if any(not 0 <= item.idx < size for item in arrived):
        raise BrokenMapping(f"the index mapping at {_label(node)} points outside its {size} channels")


def _slice(graph: BoundedGraph, node: Any, fn: Any, found: dict[int, int], number: dict[int, int]) -> GroupSlice | None:
    """Return the positions that `node` loses, or None for operations without channels."""
    side: Side
    dim = 0
    if node.type in _OPAQUE:
        raise BrokenMapping(
            f"its channels reach {_label(node)}, a {node.module_class.__name__}, which cannot be cut here"
        )
    if node.type in _ONE_WIDTH:
        if graph.get_out_channels(node) is None:  # a PReLU with one shared slope
            return None
        target, side = graph._module2name[node.module], "norm"
    elif node.type == ops.OPTYPE.PARAMETER:
        target, side, dim = graph._param_to_name[node.module], "param", node.pruning_dim % node.module.dim()
    elif node.type == ops.OPTYPE.DEPTHWISE_CONV:
        target, side = graph._module2name[node.module], "out"
    elif node.type in (ops.OPTYPE.CONV, ops.OPTYPE.LINEAR):
        target, side = graph._module2name[node.module], "out" if _changes_value(graph, node, fn) else "in"
    else:
        return None
    index = tuple(sorted(found))
    return GroupSlice(target, side, index, tuple(number[found[i]] for i in index), dim)


def _changes_value(graph: BoundedGraph, node: Any, fn: Any) -> bool:
    """Return whether cutting `node` with `fn` cuts its output; false for inputs of convolutions and linear layers."""
    if node.type in (ops.OPTYPE.CONV, ops.OPTYPE.LINEAR):
        return bool(fn == graph.get_pruner_of_module(node.module).prune_out_channels)
    return True


def _label(node: Any) -> str:
    return node._name or f"an operation ({node.module_class.__name__.strip('_')})"
