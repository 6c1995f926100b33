"""Architectures by name with what planning needs to know of them, and made-up sensitivities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel
from robust_prune.budget.analysis import Analysis
from robust_prune.budget.cost import cost_model
from robust_prune.budget.plan import make_plan
from robust_prune.models import registry
from robust_prune.models.spec import ModelSpec
from robust_prune.ranking.importance import channel_scores, removed_fraction_curve
from robust_prune.recipe import PruningSection
from robust_prune.sensitivity.profile import GroupSensitivity, ModuleSensitivity, SensitivityProfile
from robust_prune.structure.groups import find_groups
from robust_prune.structure.types import ChannelGroup
from robust_prune.surgery.apply import Surgery, apply


def spec_of(arch: str, size: int = 32) -> ModelSpec:
    """Ten classes of `size` x `size` images."""
    return registry.make_spec(arch, num_classes=10, input_size=(3, size, size), mean=(0.5,) * 3, std=(0.25,) * 3)


def profile_of(groups: Sequence[ChannelGroup], mrs: Sequence[float]) -> SensitivityProfile:
    """As if `mrs` had been measured, with curves a little steeper than linear."""
    found = tuple(GroupSensitivity(g.name, m, (m, 6 * m)) for g, m in zip(groups, mrs, strict=True))
    modules = tuple(
        ModuleSensitivity(producer, "conv", s.mrs, 1.0, s.curve)
        for g, s in zip(groups, found, strict=True)
        for producer in g.producers
    )
    return SensitivityProfile("boundary", 0.1, (0.1, 0.4), "sum", 1.0, 64, 0, ThreatModel(), modules, found)


def analysed(model: nn.Module, example: Tensor, mrs: Sequence[float] | None = None) -> Analysis:
    """Groups, costs and magnitudes; sensitivities are `mrs`, repeated as often as there are groups."""
    search = find_groups(model, example)
    groups = search.groups
    scores = channel_scores(model, groups, "magnitude")
    removed = {g.name: removed_fraction_curve(model, g, scores[g.name]) for g in groups}
    profile = None if mrs is None else profile_of(groups, [mrs[i % len(mrs)] for i in range(len(groups))])
    return Analysis(search, cost_model(model, example, groups), profile, scores, removed)


def halved(model: nn.Module, size: int = 32) -> Surgery:
    """`model` without half of its MACs, the weakest channels of every group gone."""
    example = torch.zeros(1, 3, size, size)
    plan = make_plan(analysed(model, example), PruningSection(allocation="uniform"))
    assert abs(plan.macs_after / plan.macs_before - 0.5) < 0.02
    return apply(model, plan, example)
