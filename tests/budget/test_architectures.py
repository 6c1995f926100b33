"""Budgets are met on real architectures."""

from __future__ import annotations

import pytest
import torch
from builders.plans import analysed, spec_of

from robust_prune.budget.plan import make_plan
from robust_prune.models import registry
from robust_prune.recipe import PruningSection


@pytest.mark.parametrize(
    "arch", ["timm/resnet18", "cifar/vgg16_bn", "timm/mobilenetv2_100", "timm/convnext_tiny", "timm/densenet121"]
)
def test_every_budget_is_met_within_one_percent(arch: str) -> None:
    size = 32 if arch.startswith("cifar/") else 64
    # Sensitivities over three orders of magnitude, in an order that follows neither depth nor width.
    mrs = [10 ** (-2 + 3 * (7 * i % 11) / 10) for i in range(11)]
    analysis = analysed(registry.build(spec_of(arch, size)).eval(), torch.zeros(1, 3, size, size), mrs)
    for allocation in ("mrs", "rank", "global", "uniform"):
        for ratio in (0.25, 0.5, 0.75, 0.9):
            plan = make_plan(analysis, PruningSection(ratio=ratio, allocation=allocation))
            assert 1 - plan.macs_after / plan.macs_before == pytest.approx(ratio, abs=0.01), (allocation, ratio)
            assert plan.note == ""
