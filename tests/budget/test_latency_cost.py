"""Latency as a cost of widths: what layers take alone, at any width, and without a branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import timm
from builders.branch_models import Residuals, images
from builders.weights import randomised
from torch import nn

from robust_prune.budget.cost import cost_model
from robust_prune.budget.latency_cost import LayerShape, layer_shapes, with_latency
from robust_prune.structure.branches import find_branch
from robust_prune.structure.groups import find_groups


def seconds(shape: LayerShape) -> float:
    """A machine on which a layer costs a microsecond, and more by outputs and by products."""
    positions = np.prod(shape.input[2:]) if shape.stride else np.prod(shape.input[:-1])
    products = shape.weight[0] * (1 if shape.groups > 1 else shape.weight[1]) * np.prod(shape.weight[2:])
    return 1e-6 + 1e-9 * shape.weight[0] * positions + 1e-10 * products * positions


def total(model: nn.Module) -> float:
    return sum(times * seconds(shape) for shape, times in layer_shapes(model, images()).values())


@pytest.mark.parametrize("make", [Residuals, lambda: timm.create_model("mobilenetv3_small_050", num_classes=5)])
def test_the_prediction_is_the_sum_of_the_layers_and_falls_with_each_group(make: object) -> None:
    model = randomised(make()).eval()
    groups = find_groups(model, images()[:1]).groups
    branches = {g.name: b for g in groups if (b := find_branch(model, g, images()))}
    cost = cost_model(model, images()[:1], groups, branches)
    timed: list[LayerShape] = []

    def each(shapes: Sequence[LayerShape]) -> list[float]:
        timed.extend(shapes)
        return [seconds(shape) for shape in shapes]

    priced = with_latency(cost, model, images(), groups, branches, total(model) + 5e-6, each)
    assert len(timed) == len(set(timed))
    assert priced.cost({}, "latency") == pytest.approx(1e9 * (total(model) + 5e-6), rel=1e-6)
    assert priced.macs({}) == cost.macs({}) and priced.names == cost.names
    for group in groups:
        assert priced.cost({group.name: group.channels // 2}, "latency") < priced.cost({}, "latency")


def test_a_prediction_by_hand() -> None:
    model = randomised(Residuals()).eval()
    groups = find_groups(model, images()[:1]).groups
    branches = {g.name: b for g in groups if (b := find_branch(model, g, images()))}
    cost = cost_model(model, images()[:1], groups, branches)
    priced = with_latency(
        cost, model, images(), groups, branches, total(model), lambda shapes: [seconds(s) for s in shapes]
    )
    dense = priced.cost({}, "latency")
    # blocks.0: 3x3 layers 8 -> 10 -> 8 on maps of 32x32.
    positions = 32 * 32
    lost_products = (10 - 4) * 8 * 9 * 2
    half = priced.cost({"blocks.0.conv1": 4}, "latency")
    assert dense - half == pytest.approx(1e9 * positions * (1e-9 * 6 + 1e-10 * lost_products), rel=0.02)
    gone = priced.cost({"blocks.0.conv1": 0}, "latency")
    both = seconds(LayerShape((4, 8, 32, 32), (10, 8, 3, 3), (1, 1), (1, 1), (1, 1)))
    both += seconds(LayerShape((4, 10, 32, 32), (8, 10, 3, 3), (1, 1), (1, 1), (1, 1)))
    assert dense - gone == pytest.approx(1e9 * both, rel=1e-3)


def test_shapes_are_those_that_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, padding=1), nn.Conv2d(6, 6, 5, padding="same"))
    shapes = layer_shapes(model, images())
    assert shapes["0"] == (LayerShape((4, 3, 32, 32), (6, 3, 3, 3), (2, 2), (1, 1), (1, 1)), 1)
    assert shapes["1"][0].padding == (2, 2) and shapes["1"][0].input == (4, 6, 16, 16)
    deep = LayerShape((1, 8, 4, 4), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), 8).scaled(3, 4)
    assert (deep.input, deep.weight, deep.groups) == ((1, 4, 4, 4), (4, 1, 3, 3), 4)
    assert LayerShape((2, 7, 12), (5, 12)).scaled(6, 3) == LayerShape((2, 7, 6), (3, 6))
