"""From modules to groups."""

from __future__ import annotations

import pytest
import torch
from builders.sensitivity_models import by_name, group, loss_value, mean_loss, settings
from torch import nn

from robust_prune.errors import UsageError
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.sensitivity.aggregation import aggregate_groups, tempered
from robust_prune.sensitivity.estimators import measure


def test_group_aggregations(resnet: nn.Module, adv: AdversarialSet) -> None:
    profile = measure(resnet, adv, groups=[group("g", "stem.0", "layer1.0.conv2")])
    a, b = by_name(profile)["stem.0"], by_name(profile)["layer1.0.conv2"]
    expected = {"sum": a + b, "max": max(a, b), "mean": (a + b) / 2, "quadrature": (a * a + b * b) ** 0.5}
    assert profile.aggregation == "sum" and profile.groups[0].mrs == pytest.approx(a + b)
    for rule, value in expected.items():
        again = aggregate_groups(profile, [group("g", "stem.0", "layer1.0.conv2")], rule)
        assert again.groups[0].mrs == pytest.approx(value) and again.aggregation == rule
        assert again.groups[0].curve[again.radii.index(0.1)] == pytest.approx(value)
    with pytest.raises(UsageError, match="none of which"):
        aggregate_groups(profile, [group("g", "absent")])
    with pytest.raises(UsageError, match="aggregation must be one of"):
        aggregate_groups(profile, [], "median")


def test_damping_counts_a_group_once_a_producer(resnet: nn.Module, adv: AdversarialSet) -> None:
    pair = group("pair", "stem.0", "layer1.0.conv2")
    profile = measure(resnet, adv, groups=[pair])
    a, b = (next(m for m in profile.modules if m.name == name) for name in pair.producers)
    half = tempered(profile, [pair], 0.5)
    assert half.groups[0].mrs == pytest.approx(a.mrs**0.5 + b.mrs**0.5)
    assert half.groups[0].curve[-1] == pytest.approx(a.curve[-1] ** 0.5 + b.curve[-1] ** 0.5)
    assert tempered(profile, [pair], 1.0) == profile
    assert tempered(profile, [pair], 0.0).groups[0].curve == (2.0,) * len(profile.radii)


def test_sum_is_the_joint_first_order_rise(mlp: nn.Module, mlp_adv: AdversarialSet) -> None:
    rho = 1e-5
    profile = measure(mlp, mlp_adv, settings(estimator="gradient", rho=rho), radii=(), groups=[group("g", "1", "3")])
    mlp.zero_grad()
    base = mean_loss(mlp, mlp_adv, torch.float64)
    base.backward()
    with torch.no_grad():
        for layer in (mlp[1], mlp[3]):
            layer.weight += rho * layer.weight.norm() * layer.weight.grad / layer.weight.grad.norm()
        rise = loss_value(mlp, mlp_adv, torch.float64) - base.item()
    assert profile.groups[0].mrs == pytest.approx(rise, rel=1e-3)
