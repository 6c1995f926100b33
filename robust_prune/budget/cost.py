"""Cost of a model at given widths: MACs and parameters in closed form over the numbers of kept channels.

The number of channels on each side of each layer is *affine* in the kept counts k of the groups: a sum of groups after
a concatenation, `spatial size` inputs for each channel after a flatten, a constant where nothing is cut. The MACs of a
layer are (positions x kernel) x inputs x outputs, a product of two sides. The cost of a model is therefore a quadratic
form, ``c + l·k + k·Q·k``, whose value, gradient and differences take microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ..errors import UsageError
from ..models.layout import weights_dtype
from ..models.wrappers import unwrap
from ..structure.branches import Removable
from ..structure.types import ChannelGroup
from .counting import Product, count_macs, count_params, trace_products

__all__ = ["CostModel", "Metric", "QuadraticForm", "cost_model", "count_macs", "count_params"]

Metric = Literal["macs", "params", "channels"]
Floats = npt.NDArray[np.float64]
_QUERY_NAMES = ("qkv", "q", "query", "q_proj", "to_q", "to_qkv", "in_proj_weight")


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """``constant + linear·k + k·quadratic·k`` over kept counts k, less what goes with a residual branch.

    Attributes:
        constant: cost of all that no group cuts.
        linear: coefficients [groups].
        quadratic: coefficients [groups, groups], symmetric.
        gone: position of a group, and the cost of the layers that are gone once it has no channel; none by default.
    """

    constant: float
    linear: Floats
    quadratic: Floats
    gone: tuple[tuple[int, QuadraticForm], ...] = ()

    def value(self, keep: Floats) -> float:
        """Return the cost at kept counts [groups]."""
        less = sum(form.value(keep) for at, form in self.gone if keep[at] == 0)
        return float(self.constant + keep @ (self.linear + self.quadratic @ keep)) - less

    def part(self, at: Sequence[int]) -> QuadraticForm:
        """Return the form over the groups `at`, the others without channels."""
        constant, linear, quadratic = self.constant, self.linear[at], self.quadratic[np.ix_(at, at)]
        left = []
        for position, form in self.gone:
            some = form.part(at)
            if position in at:
                left.append((list(at).index(position), some))
            else:
                constant, linear, quadratic = (
                    constant - some.constant, linear - some.linear, quadratic - some.quadratic
                )  # fmt: skip
        return QuadraticForm(constant, linear, quadratic, tuple(left))

    def gradient(self, keep: Floats) -> Floats:
        """Return the marginal cost of a channel of each group, [groups], at kept counts [groups]."""
        return self.linear + 2 * (self.quadratic @ keep)


@dataclass(frozen=True, eq=False)
class CostModel:
    """Cost of a model as a function of the number of channels that each group keeps.

    Attributes:
        names: names of the groups, in the order of all arrays.
        dense: channels of each group in the unpruned model, [groups].
        forms: quadratic forms of ``macs`` (of one image), ``params`` and ``channels`` (of all groups), by name.
    """

    names: tuple[str, ...]
    dense: Floats
    forms: Mapping[str, QuadraticForm]

    def counts(self, keep: Mapping[str, int]) -> Floats:
        """Return kept counts as an array [groups]; groups that `keep` does not name are unpruned.

        Raises:
            UsageError: `keep` names a group that the model does not have.
        """
        if unknown := keep.keys() - set(self.names):
            raise UsageError(f"the cost model has no group {sorted(unknown)[0]!r}. It has {', '.join(self.names)}.")
        return np.array([keep.get(n, d) for n, d in zip(self.names, self.dense, strict=True)], dtype=np.float64)

    def form(self, metric: str) -> QuadraticForm:
        """Return the quadratic form of ``macs``, ``params`` or ``channels``.

        Raises:
            UsageError: the metric is unknown.
        """
        if metric not in self.forms:
            raise UsageError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        return self.forms[metric]

    def cost(self, keep: Mapping[str, int], metric: str) -> int:
        """Return the cost at the given widths, in the units of `metric`; see `counts` and `form` for errors."""
        return round(self.form(metric).value(self.counts(keep)))

    def macs(self, keep: Mapping[str, int]) -> int:
        """Return the multiply-accumulates of one image at the given widths."""
        return self.cost(keep, "macs")

    def params(self, keep: Mapping[str, int]) -> int:
        """Return the number of parameters at the given widths."""
        return self.cost(keep, "params")

    def channels(self, keep: Mapping[str, int]) -> int:
        """Return the channels of all groups at the given widths; each group is counted once."""
        return self.cost(keep, "channels")

    def marginal(self, keep: Mapping[str, int], metric: str) -> dict[str, float]:
        """Return the marginal cost of a channel of each group at the given widths, by name."""
        gradient = self.form(metric).gradient(self.counts(keep))
        return dict(zip(self.names, gradient.tolist(), strict=True))


def cost_model(
    model: nn.Module,
    example: Tensor,
    groups: Sequence[ChannelGroup],
    branches: Mapping[str, Removable] = MappingProxyType({}),
) -> CostModel:
    """Derive the cost model of `model` from one forward pass and its groups.

    Args:
        model: the model; it is not changed, and the pass runs in eval mode.
        example: images [B, C, H, W] on the model's device, in any precision; costs are those of one image of this size.
        groups: groups of this model.
        branches: groups that are residual branches, by name; all of their layers' cost goes with the last channel.

    Raises:
        UsageError: two groups have the same name.
    """
    names = tuple(group.name for group in groups)
    if len(set(names)) != len(names):
        raise UsageError("two channel groups have the same name; the cost of each needs its own")
    model = unwrap(model)
    example = example.to(weights_dtype(model))
    sides, counted = Sides(model, groups), branches_of(groups, branches)
    macs, params = Terms(len(names), counted), Terms(len(names), counted)
    _add_macs(macs, sides, trace_products(model, example), len(example))
    _add_params(params, sides)
    dense = np.array([group.channels for group in groups], dtype=np.float64)
    zero = np.zeros((len(names), len(names)))
    channels = QuadraticForm(0.0, np.ones(len(names)), zero)
    return CostModel(names, dense, {"macs": macs.form(), "params": params.form(), "channels": channels})


@dataclass(frozen=True, eq=False)
class Side:
    """Channels on one dimension of a weight: ``fixed + multiplicity·k``, and `dense` in the unpruned model."""

    dense: float
    fixed: float
    multiplicity: Floats

    @property
    def cut(self) -> bool:
        return bool(self.multiplicity.any())


def branches_of(groups: Sequence[ChannelGroup], branches: Mapping[str, Removable]) -> dict[int, Removable]:
    """Return each branch once, by the position of the first of its groups."""
    found: dict[frozenset[str], int] = {}
    for at, group in enumerate(groups):
        if group.name in branches:
            found.setdefault(branches[group.name].modules, at)
    return {at: branches[groups[at].name] for at in found.values()}


class Terms:
    """A sum of products of at most two sides, as one quadratic form.

    Args:
        groups: number of groups.
        branches: residual branches by the position of their group.
    """

    def __init__(self, groups: int, branches: Mapping[int, Removable] = MappingProxyType({})) -> None:
        self._constant = 0.0
        self._linear = np.zeros(groups)
        self._quadratic = np.zeros((groups, groups))
        self._branches = {at: (branch.modules, Terms(groups)) for at, branch in branches.items()}

    def add(self, cost: float, sides: Sequence[Side], module: str) -> None:
        """Add a term of a module that is `cost` in the unpruned model and proportional to each of `sides`."""
        for modules, terms in self._branches.values():
            if module in modules:
                terms.add(cost, sides, module)
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
        gone = tuple((at, terms.form()) for at, (_, terms) in self._branches.items())
        return QuadraticForm(self._constant, self._linear, self._quadratic, gone)


class Sides:
    """Sides of every parameter of a model as functions of the groups' widths."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self.model = model
        self._groups = groups
        # Keyed by identity, since slices may use any name of a shared module.
        self._cut: dict[tuple[int, str, int], dict[int, set[int]]] = {}
        self._attention = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        for position, group in enumerate(groups):
            for part in group.slices:
                owner = _parameter(model, part.target) if part.side == "param" else model.get_submodule(part.target)
                # Depthwise convolutions and nn.MultiheadAttention have one width, whichever side names it.
                single = isinstance(owner, nn.MultiheadAttention) or _is_depthwise(owner)
                key = (id(owner), "out" if single else part.side, part.dim)
                self._cut.setdefault(key, {}).setdefault(position, set()).update(part.index)

    def of_module(self, module: nn.Module, side: str, dense: int) -> Side:
        """Return a side of a convolution, linear or norm layer."""
        return self._side((id(module), side, 0), dense)

    def of_layer(self, layer: nn.Module) -> tuple[Side, Side]:
        """Return the output and the input side of a convolution or linear layer; one for both if it is depthwise."""
        out = self.of_module(layer, "out", _width(layer, "out"))
        return out, out if _is_depthwise(layer) else self.of_module(layer, "in", _width(layer, "in"))

    def of_parameter(self, name: str) -> list[Side]:
        """Return the sides to which a parameter's cost is proportional: its layer's, or its own if it is free."""
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

    def _layer_sides(self, layer: nn.Module, parameter: nn.Parameter) -> list[Side]:
        inputs, outputs = _width(layer, "in"), _width(layer, "out")
        out = self.of_module(layer, "out", outputs)
        if parameter is not layer.weight:
            return [out] if parameter.numel() == outputs else []
        if _is_depthwise(layer):
            return [out]
        return [out, self.of_module(layer, "in", inputs)]

    def _side(self, key: tuple[int, str, int], dense: int) -> Side:
        slopes = np.zeros(len(self._groups))
        for position, indices in self._cut.get(key, {}).items():
            slopes[position] = len(indices) / self._groups[position].channels
        covered = sum(len(indices) for indices in self._cut.get(key, {}).values())
        return Side(float(dense), float(dense - covered), slopes)


def _add_macs(terms: Terms, sides: Sides, products: Sequence[Product], batch: int) -> None:
    for product in products:
        terms.add(product.macs / batch, _product_sides(sides, product), product.module)


def _product_sides(sides: Sides, product: Product) -> list[Side]:
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


def _add_params(terms: Terms, sides: Sides) -> None:
    for name, parameter in sides.model.named_parameters():
        terms.add(parameter.numel(), sides.of_parameter(name), name.rpartition(".")[0])


def _is_depthwise(layer: object) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels


def _constant(size: int, like: Side) -> Side:
    return Side(float(size), float(size), np.zeros_like(like.multiplicity))


def _width(layer: nn.Module, side: Literal["in", "out"]) -> int:
    unit = "channels" if isinstance(layer, nn.modules.conv._ConvNd) else "features"
    return int(getattr(layer, f"{side}_{unit}"))


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, attribute = name.rpartition(".")
    return cast(nn.Parameter, getattr(model.get_submodule(owner), attribute))
