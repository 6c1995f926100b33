"""Losses of real cuts: each is that of the model which surgery and repair would make, and nothing is left behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.branch_models import MODELS, Residuals, images
from builders.surgery_models import Grouped
from builders.weights import randomised
from torch import Tensor, nn

from robust_prune.attacks.threat import ThreatModel
from robust_prune.budget import cut_losses
from robust_prune.budget.allocation import allocate
from robust_prune.budget.allocations.cuts import loss_by_width
from robust_prune.budget.analysis import Analysis
from robust_prune.budget.cost import cost_model, count_macs, count_params
from robust_prune.budget.cut_losses import CutLoss, measure_cuts
from robust_prune.budget.plan import make_plan
from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.data.base import TensorImages
from robust_prune.errors import UsageError
from robust_prune.models.branches import taken_out
from robust_prune.recipe import PruningSection
from robust_prune.structure.branches import find_branch
from robust_prune.structure.groups import find_groups
from robust_prune.structure.types import ChannelGroup
from robust_prune.surgery.apply import apply
from robust_prune.surgery.reconstruction import reconstruct
from robust_prune.surgery.repair import fit_branches

THREAT = ThreatModel("linf", 8 / 255)


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, TensorImages, Analysis]:
    model = randomised(Residuals()).eval()
    generator = torch.Generator().manual_seed(3)
    pictures = TensorImages(
        torch.randint(256, (48, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(48) % 5
    )
    search = find_groups(model, images()[:1])
    scores = {g.name: torch.rand(g.channels, generator=generator) for g in search.groups}
    branches = {g.name: b for g in search.groups if (b := find_branch(model, g, images()))}
    losses = measure_cuts(model, pictures, search.groups, scores, branches, THREAT, seed=1)
    cost = cost_model(model, images()[:1], search.groups, branches)
    return model, pictures, Analysis(search, cost, None, scores, None, "random", losses, branches)


def test_every_group_is_measured_at_some_widths_and_branches_without_channels(measured: tuple) -> None:
    _, _, analysis = measured
    assert set(analysis.branches) == {f"blocks.{i}.conv1" for i in range(3)}
    for group in analysis.search.groups:
        widths = [cut.keep for cut in analysis.cut_losses[group.name]]
        assert widths == sorted(set(widths)) and all(cut.error > 0 for cut in analysis.cut_losses[group.name])
        assert (0 in widths) == (group.name in analysis.branches)
        assert group.channels // 2 in widths and group.channels not in widths


def test_losses_are_divergences_from_the_dense_model_and_fall_with_the_width(measured: tuple) -> None:
    _, _, analysis = measured
    for cuts in analysis.cut_losses.values():
        values = [cut.divergence for cut in cuts if cut.keep]
        assert min(values) > 0 and values[0] > values[-1]


def test_measuring_leaves_the_model_as_it_was_and_repeats(measured: tuple) -> None:
    model, pictures, analysis = measured
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    again = measure_cuts(model, pictures, analysis.search.groups, analysis.scores, analysis.branches, THREAT, seed=1)
    assert again == analysis.cut_losses
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == modules and [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_a_measured_cut_is_that_of_surgery_and_repair(
    measured: tuple, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    model, pictures, analysis = measured
    group = next(g for g in analysis.search.groups if g.name == "blocks.1.conv1")
    shown: list[Tensor] = []
    logits: list[Tensor] = []
    original_gram = cut_losses._gram_matrices

    def gram(model: nn.Module, names: set[str], given: Tensor) -> dict[str, Tensor]:
        shown.append(given)
        return original_gram(model, names, given)

    def answered(model: nn.Module, *_: object) -> Tensor:
        with torch.no_grad():
            logits.append(model(images()))
        return torch.zeros(len(images()), 5)

    monkeypatch.setattr(cut_losses, "_gram_matrices", gram)
    monkeypatch.setattr(cut_losses, "_log_probabilities", answered)
    monkeypatch.setattr(cut_losses, "SHARES", (keep / group.channels,))
    measure_cuts(model, pictures, [group], analysis.scores, analysis.branches, THREAT, seed=1)
    found = logits[1 if keep == 0 else 2]

    order = analysis.scores[group.name].argsort(stable=True)
    planned = [
        PlannedGroup(g.name, g.channels, tuple(sorted(order[: g.channels - keep].tolist())) if g is group else (), None)
        for g in analysis.search.groups
    ]
    plan = make_plan(analysis, PruningSection(allocation="uniform", ratio=0.5))
    surgery = apply(model, replace(plan, groups=tuple(planned)), images()[:1])
    assert surgery.rolled_back == ()
    fit_branches(surgery.model, model, surgery.removed, shown[0])
    reconstruct(surgery.model, model, surgery.removed, shown[0])
    with torch.no_grad():
        wanted = surgery.model.eval()(images())
        assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))
        assert not torch.allclose(found, model(images()), atol=1e-2 * float(wanted.abs().max()))


def test_expected_losses_pass_through_the_measured_ones_and_are_convex(measured: tuple) -> None:
    _, _, analysis = measured
    group = next(g for g in analysis.search.groups if g.channels == 12)
    measured_cuts = (CutLoss(0, 5.0, 0.1), CutLoss(2, 1.0, 0.1), CutLoss(3, 0.5, 0.1), CutLoss(6, 0.1, 0.01))
    loss = loss_by_width(group, measured_cuts)
    assert loss.shape == (13,) and loss[12] == 0
    assert np.allclose(loss[[2, 3, 6]], [1.0, 0.5, 0.1])
    assert (np.diff(loss) <= 0).all() and (np.diff(loss, 2) >= -1e-9).all()
    noisy = loss_by_width(group, (CutLoss(2, 0.01, 0.02), CutLoss(6, 0.001, 0.003)))
    assert np.allclose(noisy[[2, 6]], [0.02, 0.003])  # a divergence within its error counts as the error


def with_losses(analysis: Analysis, without: float) -> Analysis:
    losses = {
        g.name: tuple(
            CutLoss(keep, (without if keep == 0 else 0.5 / keep), 1e-4)
            for keep in ((0, 1, 3, 5) if g.name in analysis.branches else (1, 3, 5))
        )
        for g in analysis.search.groups
    }
    return replace(analysis, cut_losses=losses)


@pytest.mark.parametrize(("without", "gone"), [(1e-3, True), (10.0, False)])
def test_branches_go_whole_where_that_costs_less(measured: tuple, without: float, gone: bool) -> None:
    analysis = with_losses(measured[2], without)
    section = PruningSection(allocation="cuts", ratio=0.6, round_to=1)
    budget = 0.4 * analysis.cost.macs({})
    keep = allocate(analysis, section, budget)
    empty = {name for name, count in keep.items() if count == 0}
    assert (empty != set()) == gone and empty <= set(analysis.branches)
    assert abs(analysis.cost.macs(keep) - budget) <= 0.01 * analysis.cost.macs({})
    assert without < 1 or empty == set()
    never = allocate(analysis, section.model_copy(update={"branches": False}), budget)
    assert 0 not in never.values()
    plan = make_plan(analysis, section)
    surgery = apply(measured[0], plan, images()[:1])
    assert surgery.rolled_back == () and len(surgery.branches) == len(empty)


def test_a_plan_without_these_losses_says_how_to_get_them(measured: tuple) -> None:
    analysis = replace(measured[2], cut_losses=None)
    with pytest.raises(UsageError, match=r"needs losses of real cuts.*allocation=cuts"):
        make_plan(analysis, PruningSection(allocation="cuts"))


def test_branches_go_until_the_smallest_widths_meet_the_budget(measured: tuple) -> None:
    analysis = with_losses(measured[2], 10.0)  # dearer than any width, but without them the budget is out of reach
    section = PruningSection(allocation="cuts", ratio=0.8, round_to=1, min_keep=0.7)
    budget = 0.2 * analysis.cost.macs({})
    floors = {g.name: -(-7 * g.channels // 10) for g in analysis.search.groups}
    assert analysis.cost.macs(floors) > 1.5 * budget
    plan = make_plan(analysis, section)
    assert any(group.keep == 0 for group in plan.groups) and plan.note == ""
    assert abs(plan.macs_after - budget) <= 0.01 * analysis.cost.macs({})
    dear = make_plan(analysis, section.model_copy(update={"ratio": 0.97}))
    assert [group.keep for group in dear.groups if group.name in analysis.branches] == [0, 0, 0]
    assert "every group is at its floor" in dear.note


@pytest.mark.parametrize("kind", MODELS)
def test_costs_are_those_of_the_model_without_the_branches(kind: str) -> None:
    make, whole = MODELS[kind]
    model = randomised(make()).eval()
    search = find_groups(model, images()[:1])
    branches = {g.name: b for g in search.groups if (b := find_branch(model, g, images()))}
    cost = cost_model(model, images()[:1], search.groups, branches)
    gone = {g.name for n in whole for g in search.groups if branches[n].modules.issuperset(g.producers)}
    keep = {g.name: 0 if g.name in gone else g.blocks * (g.channels // g.blocks // 2) for g in search.groups}
    planned = tuple(
        PlannedGroup(g.name, g.channels, _last(g, g.channels - keep[g.name]), None, g.traced, g.members)
        for g in search.groups
    )
    plan = PruningPlan(0.5, "macs", "cuts", "random", 1, planned, (), 1, 1, 1, 1)
    surgery = apply(model, plan, images()[:1])
    assert surgery.rolled_back == ()
    constants = sum(surgery.model.get_parameter(name).numel() for name in taken_out(surgery.model))
    assert cost.macs(keep) == pytest.approx(count_macs(surgery.model, images()[:1]), rel=1e-3)
    assert cost.params(keep) == pytest.approx(count_params(surgery.model) - constants, rel=1e-2)


def _last(group: ChannelGroup, count: int) -> tuple[int, ...]:
    part, each = group.channels // group.blocks, count // group.blocks
    return tuple(b * part + i for b in range(group.blocks) for i in range(part - each, part))


def test_a_cut_before_a_grouped_layer_is_not_free() -> None:
    model = randomised(Grouped()).eval()
    search = find_groups(model, images()[:1])
    group = next(g for g in search.groups if g.name == "b")  # read by a convolution of four groups
    scores = {group.name: torch.rand(group.channels)}
    pictures = TensorImages(torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8), torch.arange(24) % 5)
    losses = measure_cuts(model, pictures, [group], scores, {}, THREAT)[group.name]
    assert all(abs(cut.divergence) > 1e-6 and cut.error > 1e-6 for cut in losses)
