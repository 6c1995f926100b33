"""Attention blocks: their query, key, value and projection layers and their heads, found by tracing a forward pass.

A cut removes the same number of dimensions from every head: the same channels of query, key and value, and the
corresponding inputs of the projection. The number of heads, relative position biases and reshapes are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .cutting import scale_rows
from .types import ChannelGroup, GroupSlice


@dataclass(frozen=True)
class Adaptation:
    """Changes that adapt an attention block to a cut.

    Attributes:
        attributes: new values of attributes of the block's module.
        fold: whether the change of the softmax temperature is folded into the query weights.
    """

    attributes: dict[str, Any] = field(default_factory=dict)
    fold: bool = True


@dataclass(frozen=True)
class Attention:
    """One attention block.

    Attributes:
        owner: qualified name of the module that computes the attention.
        producers: names of the linear layers that compute query, key and value: one fused layer, a query layer and a
            fused pair, or three layers.
        projection: name of the linear layer behind the attention.
        heads: number of heads.
        width: channels of the query (and of key and value): heads * head dimension.
        head_major: whether a fused layer stores query, key and value of each head together.
        obstacle: why the block cannot be cut; empty if it can.
    """

    owner: str
    producers: tuple[str, ...]
    projection: str
    heads: int
    width: int
    head_major: bool = False
    obstacle: str = ""

    @property
    def head_dim(self) -> int:
        """Channels of each head."""
        return self.width // self.heads

    def group(self) -> ChannelGroup:
        """Return the block as a group; channel ``head * head_dim + d`` is dimension d of a head in every layer."""
        whole = tuple(range(self.width))
        first, *others = self.producers
        slices = [self._rows(first, 1 if others else 3), *(self._rows(p, 2 // len(others)) for p in others)]
        slices.append(GroupSlice(self.projection, "in", whole, whole))
        return ChannelGroup(self.producers[0], self.width, tuple(slices), self.heads)

    def _rows(self, producer: str, widths: int) -> GroupSlice:
        index = tuple(range(widths * self.width))
        return GroupSlice(producer, "out", index, tuple(self._channel(i) for i in index))

    def _channel(self, row: int) -> int:
        if not self.head_major:
            return row % self.width
        return row // (3 * self.head_dim) * self.head_dim + row % self.head_dim

    def other_layout(self) -> Attention | None:
        """Return the block with the other row order of a fused layer, or None; a proof decides which is right."""
        return replace(self, head_major=True) if len(self.producers) == 1 and not self.head_major else None

    def alternatives(self, model: nn.Module, keep: int) -> Iterator[Adaptation]:
        """Yield adaptations of the owner to `keep` channels, the likeliest first; a proof decides between them."""
        values = vars(model.get_submodule(self.owner))
        new = {self.head_dim: keep // self.heads, self.width: keep, 3 * self.width: 3 * keep}
        sizes = {k: new[v] for k, v in values.items() if type(v) is int and v in new and k != "training"}
        # A value equal to the number of heads may be the number of heads: leave such attributes first, then try them.
        unclear = [k for k in sizes if values[k] == self.heads][:4]
        subsets = [set(chosen) for n in range(len(unclear) + 1) for chosen in combinations(unclear, n)]
        old = self.head_dim**-0.5
        scales = {
            k: (keep // self.heads) ** -0.5 for k, v in values.items() if type(v) is float and math.isclose(v, old)
        }
        attributes = [{k: v for k, v in sizes.items() if k not in unclear or k in chosen} for chosen in subsets]
        if sizes:
            attributes.append({})
        for fold, chosen in product((True, False), attributes):
            yield Adaptation({**chosen, **(scales if fold else {})}, fold)

    def adapt(self, model: nn.Module, keep: int, how: Adaptation) -> None:
        """Set the owner's attributes and fold the change of the softmax temperature into the query weights, in place.

        Scaled dot-product attention divides by the square root of the *current* head dimension, so a cut from d to d'
        would sharpen the softmax by √(d/d'). Multiplying the query rows by √(d'/d) cancels this, in the fused and in
        the explicit implementation.
        """
        vars(model.get_submodule(self.owner)).update(how.attributes)
        if not how.fold:
            return
        factor = math.sqrt(keep / self.width)
        layer = model.get_submodule(self.producers[0])
        if len(self.producers) > 1 or not self.head_major:
            scale_rows(layer, slice(0, keep), factor)
            return
        dim = keep // self.heads
        for head in range(self.heads):
            scale_rows(layer, slice(3 * head * dim, (3 * head + 1) * dim), factor)


def find_attention(model: nn.Module, images: Tensor) -> list[Attention]:
    """Return every attention block of `model` whose query, key, value and projection are linear layers.

    Args:
        model: in eval mode.
        images: a batch [N, C, H, W].
    """
    log = _watch(model, images)
    found: dict[str, Attention] = {}
    for at, event in enumerate(log):
        if event.heads:
            attention = _classify(model, log, at)
            if attention is not None:
                found.setdefault(attention.producers[0], attention)
    return list(found.values())


@dataclass(frozen=True)
class _Event:
    """A layer that ran (`heads` is 0), or an attention product with its number of heads and the module it ran in."""

    name: str
    heads: int = 0


class _Watcher(TorchFunctionMode):
    """Records attention products and their softmaxes, with the module in which they run.

    Linear layers are identified by their weights, since a module may pass the weights to a function and never call the
    layer.
    """

    def __init__(self, model: nn.Module, log: list[_Event], stack: list[str]) -> None:
        super().__init__()
        self._log, self._stack = log, stack
        self._linear = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "linear" and (layer := self._linear.get(id(args[1] if len(args) > 1 else kwargs["weight"]))):
            self._log.append(_Event(layer))
        heads = 0
        if name == "scaled_dot_product_attention" and args[0].dim() >= 4:
            heads = args[0].shape[-3]
        elif name == "softmax" and isinstance(result, Tensor) and result.dim() >= 4:
            heads = result.shape[-3]
        if heads and self._stack:
            self._log.append(_Event(self._stack[-1], heads))
        return result


def _watch(model: nn.Module, images: Tensor) -> list[_Event]:
    log: list[_Event] = []
    stack: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, inputs: stack.append(name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        name = stack.pop()
        if _normalises(module):
            log.append(_Event(name))

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        with torch.no_grad(), _Watcher(model, log, stack):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return log


def _normalises(module: nn.Module) -> bool:
    return isinstance(getattr(module, "normalized_shape", None), tuple)


def _classify(model: nn.Module, log: list[_Event], at: int) -> Attention | None:
    """Return the attention block of the product at position `at`: the innermost module with layers on both sides."""
    owner = log[at].name
    while True:
        before, after = _own(log[:at], owner, model), _own(log[at + 1 :], owner, model)
        if before and after:
            break
        if not owner:
            return None
        owner = owner.rpartition(".")[0]
    heads, linear = log[at].heads, [n for n in before if isinstance(model.get_submodule(n), nn.Linear)]
    projection = next((n for n in after if isinstance(model.get_submodule(n), nn.Linear)), None)
    if not linear or projection is None:
        return None
    width: int = model.get_submodule(projection).in_features  # type: ignore[assignment]
    fused = [n for n in linear if model.get_submodule(n).out_features == 3 * width]
    pair = [n for n in linear if model.get_submodule(n).out_features == 2 * width]
    apart = [n for n in linear if model.get_submodule(n).out_features == width]
    layouts = ((fused, len(fused) == 1), (apart, len(apart) == 3), (apart + pair, len(apart) == len(pair) == 1))
    producers = next((names for names, complete in layouts if complete), None)
    if width % heads or producers is None:
        return None
    norms = [n for n in before if _normalises(model.get_submodule(n))]
    sizes = {model.get_submodule(n).normalized_shape[-1] for n in norms}  # type: ignore[index]
    obstacle = ""
    if heads > 1 and sizes & {width // heads}:
        obstacle = f"its queries and keys are normalised per head ({norms[-1]}), which ties all dimensions of a head"
    return Attention(owner, tuple(producers), projection, heads, width, obstacle=obstacle)


def _own(events: list[_Event], owner: str, model: nn.Module) -> list[str]:
    prefix = f"{owner}." if owner else ""
    return [e.name for e in events if not e.heads and e.name.startswith(prefix)]
