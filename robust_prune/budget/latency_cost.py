"""Latency as a cost of widths: layers are timed alone at some widths, and each latency is fitted by its widths.

MACs rank layers poorly where latency counts: a layer of few channels on a large map takes longer than its MACs say, and
part of its time stays whatever its width. The latency of a layer with ``i`` inputs and ``o`` outputs is fitted by
``a + b·o + c·i·o`` with coefficients of at least 0; that of everything else counts as constant. What remains of the sum
for other widths is a guide for the planner: candidates are timed as whole files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from ..introspect.modes import eval_mode
from ..models.layout import weights_dtype
from ..structure.branches import Removable
from ..structure.types import ChannelGroup
from .cost import CostModel, Sides, Terms, branches_of

SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)
"""Shares of a layer's width at which it is timed."""
NANOSECONDS = 1e9
_LEAST_SHARE = 0.05


@dataclass(frozen=True)
class LayerShape:
    """What the latency of a convolution or linear layer depends on.

    Attributes:
        input: shape of its input, [N, C, H, W] or [..., inputs].
        weight: shape of its weight.
        stride, padding, dilation: of a convolution, by dimension; empty for a linear layer.
        groups: groups of a convolution.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def scaled(self, inputs: int, outputs: int) -> LayerShape:
        """Return the shape with other numbers of channels; a depthwise convolution has `outputs` of both."""
        if not self.stride:
            return replace(self, input=(*self.input[:-1], inputs), weight=(outputs, inputs))
        depthwise = self.groups > 1
        inputs = outputs if depthwise else inputs
        weight = (outputs, 1 if depthwise else inputs, *self.weight[2:])
        given = (self.input[0], inputs, *self.input[2:])
        return replace(self, input=given, weight=weight, groups=outputs if depthwise else 1)


@torch.no_grad()
def layer_shapes(model: nn.Module, images: Tensor) -> dict[str, tuple[LayerShape, int]]:
    """Return the shape of each plain 2d convolution and linear layer, and how often it runs in a pass.

    Args:
        model: the model; it runs in eval mode.
        images: images [N, C, H, W] on the model's device, of the batch whose latency counts.
    """
    found: dict[str, tuple[LayerShape, int]] = {}

    def note(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            given = args[0] if args else kwargs["input"]
            shape = LayerShape(tuple(given.shape), tuple(layer.weight.shape))
            if isinstance(layer, nn.Conv2d):
                padding = layer._reversed_padding_repeated_twice[::-1][::2]
                shape = replace(
                    shape, stride=layer.stride, padding=tuple(padding), dilation=layer.dilation, groups=layer.groups
                )
            found[name] = (shape, found.get(name, (shape, 0))[1] + 1)

        return hook

    plain = (nn.Conv2d.forward, nn.Linear.forward)  # others may pad their inputs themselves
    layers = {name: module for name, module in model.named_modules() if type(module).forward in plain}
    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with eval_mode(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def with_latency(
    cost: CostModel,
    model: nn.Module,
    images: Tensor,
    groups: Sequence[ChannelGroup],
    branches: Mapping[str, Removable],
    whole: float,
    seconds: Callable[[Sequence[LayerShape]], Sequence[float]],
) -> CostModel:
    """Return `cost` with the metric ``latency``, in nanoseconds of one pass over `images`.

    Args:
        cost: costs of the model.
        model: the model.
        images: images [N, C, H, W] on the model's device, of the batch whose latency counts.
        groups: groups of the model, those of `cost`.
        branches: residual branches that may go whole, by the name of their group.
        whole: latency of the whole model in seconds. The sum over layers is scaled down to it if it exceeds it.
        seconds: times layers, each alone.
    """
    images = images.to(weights_dtype(model))
    sides, terms = Sides(model, groups), Terms(len(groups), branches_of(groups, branches))
    tables = {name: (times, _table(sides, model, name, shape)) for name, (shape, times) in
              layer_shapes(model, images).items()}  # fmt: skip
    wanted = list(dict.fromkeys(shape for _, table in tables.values() for shape in table))
    measured = dict(zip(wanted, seconds(wanted), strict=True))
    dense = sum(times * measured[table[0]] for times, table in tables.values())
    scale = NANOSECONDS * min(1.0, whole / dense)
    for name, (times, table) in tables.items():
        fixed, by_output, by_both = (times * scale * part for part in _fit(table, measured))
        module: Any = model.get_submodule(name)
        out, into = sides.of_layer(module)
        outputs = table[0].weight[0]
        terms.add(fixed, [], name)
        terms.add(by_output * outputs, [out], name)
        terms.add(by_both * outputs * table[0].weight[1], [out] if into is out else [out, into], name)
    terms.add(max(0.0, NANOSECONDS * whole - scale * dense), [], "")
    return replace(cost, forms={**cost.forms, "latency": terms.form()})


def _table(sides: Sides, model: nn.Module, name: str, shape: LayerShape) -> list[LayerShape]:
    """Return the shapes at which a layer is timed, the present one first."""
    out, into = sides.of_layer(model.get_submodule(name))
    outputs, inputs = shape.weight[0], shape.input[-1 if not shape.stride else 1]
    if shape.groups not in (1, inputs) or not (out.cut or into.cut):
        return [shape]
    found = [shape]
    for share in SHARES[1:]:
        now = (max(1, round(share * n)) if side.cut else n for n, side in ((inputs, into), (outputs, out)))
        found.append(shape.scaled(*now))
    return list(dict.fromkeys(found))


def _fit(table: Sequence[LayerShape], seconds: Mapping[LayerShape, float]) -> tuple[float, float, float]:
    """Return the constant part of a layer's latency, and its coefficients by outputs and by inputs times outputs."""
    times = np.array([seconds[shape] for shape in table])
    if len(table) == 1:
        return float(times[0]), 0.0, 0.0
    outputs = np.array([float(shape.weight[0]) for shape in table])
    inputs = np.array([float(shape.weight[1]) for shape in table])
    rows = np.stack([np.ones(len(table)), outputs / outputs[0], inputs * outputs / (inputs[0] * outputs[0])], 1)
    # Relative errors count, since the planner compares candidates whose layers are all narrow; but the shortest times
    # are mostly noise.
    size = np.maximum(times, _LEAST_SHARE * times[0])
    found, _ = nnls(rows / size[:, None], times / size)
    return float(found[0]), float(found[1] / outputs[0]), float(found[2] / (inputs[0] * outputs[0]))
