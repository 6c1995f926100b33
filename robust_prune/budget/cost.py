"""What a model costs at given widths: MACs and parameters as arithmetic on the number of kept channels.

The number of channels on each side of each layer is *affine* in the kept counts k of the groups: several groups side by
side after a concatenation, `spatial size` positions a channel after a flatten, a constant where nothing is cut. A layer
costs (positions x kernel) x inputs x outputs, a product of two such sides. So a whole model's cost is one quadratic
form, ``c + l·k + k·Q·k``, whose value, gradient and differences take microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ..errors import UsageError
from ..models.layout import weights_dtype
from ..models.wrappers import unwrap
from ..structure.types import ChannelGroup
from .counting import Product, count_macs, count_params, trace_products

__all__ = ["CostModel", "Metric", "QuadraticForm", "cost_model", "count_macs", "count_params"]

Metric = Literal["macs", "params", "channels"]
Floats = npt.NDArray[np.float64]
_QUERY_NAMES = ("qkv", "q", "query", "q_proj", "to_q", "to_qkv", "in_proj_weight")


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """``constant + linear·k + k·quadratic·k`` over kept counts k.

    Attributes:
        constant: cost of what no group cuts.
        linear: [groups].
        quadratic: [groups, groups], symmetric.
    """

    constant: float
    linear: Floats
    quadratic: Floats

    def value(self, keep: Floats) -> float:
        """Cost at kept counts [groups]."""
        return float(self.constant + keep @ (self.linear + self.quadratic @ keep))

    def gradient(self, keep: Floats) -> Floats:
        """Cost per channel of each group at kept counts [groups]."""
        return self.linear + 2 * (self.quadratic @ keep)


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost of a model as a function of how many channels each group keeps.

    Attributes:
        names: the groups, in the order of every array here.
        dense: channels of each group in the whole model, [groups].
        forms: one quadratic form each for ``macs`` (of one image), ``params`` and ``channels`` (of all groups).
    """

    names: tuple[str, ...]
    dense: Floats
    forms: Mapping[str, QuadraticForm]

    def counts(self, keep: Mapping[str, int]) -> Floats:
        """Kept counts as an array [groups]; groups that `keep` does not name stay whole.

        Raises:
            UsageError: a group that the model does not have.
        """
        if unknown := keep.keys() - set(self.names):
            raise UsageError(f"the cost model has no group {sorted(unknown)[0]!r}. It has {', '.join(self.names)}.")
        return np.array([keep.get(n, d) for n, d in zip(self.names, self.dense, strict=True)], dtype=np.float64)

    def form(self, metric: str) -> QuadraticForm:
        """The quadratic form of ``macs``, ``params`` or ``channels``.

        Raises:
            UsageError: any other name.
        """
        if metric not in self.forms:
            raise UsageError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        return self.forms[metric]

    def cost(self, keep: Mapping[str, int], metric: str) -> int:
        """Cost at the given widths, in the units of `metric`."""
        return round(self.form(metric).value(self.counts(keep)))

    def macs(self, keep: Mapping[str, int]) -> int:
        """Multiply-accumulates of one image at the given widths."""
        return self.cost(keep, "macs")

    def params(self, keep: Mapping[str, int]) -> int:
        """Parameters at the given widths."""
        return self.cost(keep, "params")

    def channels(self, keep: Mapping[str, int]) -> int:
        """Channels of all groups together at the given widths, each group counted once."""
        return self.cost(keep, "channels")

    def marginal(self, keep: Mapping[str, int], metric: str) -> dict[str, float]:
        """What one channel of each group costs at the given widths."""
        gradient = self.form(metric).gradient(self.counts(keep))
        return dict(zip(self.names, gradient.tolist(), strict=True))


def cost_model(model: nn.Module, example: Tensor, groups: Sequence[ChannelGroup]) -> CostModel:
    """Learns the cost of `model` from one forward pass and its groups.

    Args:
        model: left as it came; the pass runs in eval mode.
        example: [B, C, H, W] on the model's device, in any precision; costs are those of one image of this size.
        groups: of this model.

    Raises:
        UsageError: two groups with one name.
    """
    names = tuple(group.name for group in groups)
    if len(set(names)) != len(names):
        raise UsageError("two channel groups have the same name; the cost of each needs its own")
    model = unwrap(model)
    example = example.to(weights_dtype(model))
    sides = _Sides(model, groups)
    macs, params = _Terms(len(names)), _Terms(len(names))
    _add_macs(macs, sides, trace_products(model, example), len(example))
    _add_params(params, sides)
    dense = np.array([group.channels for group in groups], dtype=np.float64)
    zero = np.zeros((len(names), len(names)))
    channels = QuadraticForm(0.0, np.ones(len(names)), zero)
    return CostModel(names, dense, {"macs": macs.form(), "params": params.form(), "channels": channels})


@dataclass(frozen=True, eq=False)
class _Side:
    """Channels on one dimension of a weight: ``fixed + multiplicity·k``; `dense` with every group whole."""

    dense: float
    fixed: float
    multiplicity: Floats

    @property
    def cut(self) -> bool:
        return bool(self.multiplicity.any())


class _Terms:
    """A sum of products of at most two sides, gathered into one quadratic form."""

    def __init__(self, groups: int) -> None:
        self._constant = 0.0
        self._linear = np.zeros(groups)
        self._quadratic = np.zeros((groups, groups))

    def add(self, cost: float, sides: Sequence[_Side]) -> None:
        """Adds what costs `cost` in the dense model and scales with each of `sides`."""
        live = [s for s in sides if s.cut and s.dense > 0]
        # A third cut dimension is held at its dense size; no layer that surgery handles has one.
        live = live[:2]
        share = cost / math.prod(s.dense for s in live)
        fixed = [s.fixed for s in live] + [1.0] * (2 - len(live))
        slopes = [s.multiplicity for s in live] + [np.zeros_like(self._linear)] * (2 - len(live))
        outer = np.outer(slopes[0], slopes[1])
        self._constant += share * fixed[0] * fixed[1]
        self._linear += share * (fixed[1] * slopes[0] + fixed[0] * slopes[1])
        self._quadratic += share * (outer + outer.T) / 2

    def form(self) -> QuadraticForm:
        return QuadraticForm(self._constant, self._linear, self._quadratic)


class _Sides:
    """The sides of every parameter of a model, as its groups cut them."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self.model = model
        self._groups = groups
        # By identity, so that a shared module is one module whichever of its names a slice uses.
        self._cut: dict[tuple[int, str, int], dict[int, set[int]]] = {}
        self._attention = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        for position, group in enumerate(groups):
            for part in group.slices:
                owner = _parameter(model, part.target) if part.side == "param" else model.get_submodule(part.target)
                # Depthwise convolutions and nn.MultiheadAttention have one width, whichever side names it.
                single = isinstance(owner, nn.MultiheadAttention) or _is_depthwise(owner)
                key = (id(owner), "out" if single else part.side, part.dim)
                self._cut.setdefault(key, {}).setdefault(position, set()).update(part.index)

    def of_module(self, module: nn.Module, side: str, dense: int) -> _Side:
        """A side of a conv, linear or norm layer."""
        return self._side((id(module), side, 0), dense)

    def of_parameter(self, name: str) -> list[_Side]:
        """The dimensions that a parameter's cost scales with: those of its layer, or its own if it is free."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        parameter = _parameter(self.model, name)
        attention = self._attention.get(id(owner), owner)
        if isinstance(attention, nn.MultiheadAttention):
            width = self.of_module(attention, "out", attention.embed_dim)
            return [width if n % attention.embed_dim == 0 else _constant(n, width) for n in parameter.shape]
        if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
            return self._layer_sides(owner, parameter)
        free = [self._side((id(parameter), "param", d), n) for d, n in enumerate(parameter.shape)]
        norm = self.of_module(owner, "norm", parameter.numel())
        return [norm] if norm.cut and parameter.numel() > 1 else free

    def _layer_sides(self, layer: nn.Module, parameter: nn.Parameter) -> list[_Side]:
        inputs, outputs = _width(layer, "in"), _width(layer, "out")
        out = self.of_module(layer, "out", outputs)
        if parameter is not layer.weight:
            return [out] if parameter.numel() == outputs else []
        if _is_depthwise(layer):
            return [out]
        return [out, self.of_module(layer, "in", inputs)]

    def _side(self, key: tuple[int, str, int], dense: int) -> _Side:
        slopes = np.zeros(len(self._groups))
        for position, indices in self._cut.get(key, {}).items():
            slopes[position] = len(indices) / self._groups[position].channels
        covered = sum(len(indices) for indices in self._cut.get(key, {}).values())
        return _Side(float(dense), float(dense - covered), slopes)


def _add_macs(terms: _Terms, sides: _Sides, products: Sequence[Product], batch: int) -> None:
    for product in products:
        terms.add(product.macs / batch, _product_sides(sides, product))


def _product_sides(sides: _Sides, product: Product) -> list[_Side]:
    if product.parameter is not None:
        return sides.of_parameter(product.parameter)
    module = sides.model.get_submodule(product.module)
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):  # its weight is computed, e.g. standardised
        return sides.of_parameter(f"{product.module}.weight" if product.module else "weight")
    for name in _QUERY_NAMES:  # attention: query-key and attention-value products both grow with heads x head width
        query = getattr(module, name, None)
        if isinstance(query, nn.Linear):
            return [sides.of_module(query, "out", query.out_features)]
        if isinstance(query, nn.Parameter):
            return sides.of_parameter(f"{product.module}.{name}")[:1]
    return []


def _add_params(terms: _Terms, sides: _Sides) -> None:
    for name, parameter in sides.model.named_parameters():
        terms.add(parameter.numel(), sides.of_parameter(name))


def _is_depthwise(layer: object) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels


def _constant(size: int, like: _Side) -> _Side:
    return _Side(float(size), float(size), np.zeros_like(like.multiplicity))


def _width(layer: nn.Module, side: Literal["in", "out"]) -> int:
    unit = "channels" if isinstance(layer, nn.modules.conv._ConvNd) else "features"
    return int(getattr(layer, f"{side}_{unit}"))


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, attribute = name.rpartition(".")
    return cast(nn.Parameter, getattr(model.get_submodule(owner), attribute))
