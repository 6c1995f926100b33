"""Plans on real groups, and their table."""

import dataclasses
import io

import pytest
import timm
import torch
from builders.plans import profile_of
from rich.console import Console
from torch import nn

from robust_prune.budget.allocation import allocate
from robust_prune.budget.analysis import Analysis
from robust_prune.budget.cost import cost_model, count_macs, count_params
from robust_prune.budget.plan import make_plan, render_plan
from robust_prune.budget.rounding import floor_of
from robust_prune.budget.types import PruningPlan
from robust_prune.errors import UsageError
from robust_prune.ranking.importance import channel_scores, removed_fraction_curve
from robust_prune.recipe import PruningSection
from robust_prune.recipe_reader import make_section
from robust_prune.serialization import from_json, to_json
from robust_prune.structure.groups import GroupSearch, find_groups
from robust_prune.structure.types import ChannelGroup, GroupSlice, Skipped
from robust_prune.surgery.apply import apply


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


def span(target, side, channels):
    return GroupSlice(target, side, tuple(range(channels)), tuple(range(channels)))


X = torch.zeros(1, 3, 8, 8)


GROUPS = (
    ChannelGroup("a", 32, (span("a", "out", 32), span("b", "in", 32)), blocks=4),
    ChannelGroup("b", 64, (span("b", "out", 64), span("fc", "in", 64)), blocks=4),
)


FOUND = GroupSearch(GROUPS, (Skipped("odd", "its index mapping is broken"),))


def plan_for(ratio=0.5, **options):
    torch.manual_seed(0)
    model = Net()
    scores = {g.name: torch.rand(g.channels) for g in GROUPS}
    fractions = {g.name: removed_fraction_curve(model, g, scores[g.name]) for g in GROUPS}
    cost = cost_model(model, X, GROUPS)
    section = make_section(PruningSection, ratio=ratio, **{"criterion": "random", "round_to": 4} | options)
    plan = make_plan(Analysis(FOUND, cost, profile_of(GROUPS, [1.0, 2.0]), scores, fractions), section)
    return plan, scores


def test_the_lowest_scores_go_equally_from_every_block():
    plan, scores = plan_for(allocation="uniform")
    for group in plan.groups:
        rows = scores[group.name].view(4, -1)
        gone = torch.zeros(group.channels, dtype=torch.bool)
        gone[list(group.removed)] = True
        gone = gone.view(4, -1)
        assert 0 < len(group.removed) < group.channels and list(group.removed) == sorted(group.removed)
        assert len(set(gone.sum(1).tolist())) == 1
        assert all(row[lost].max() <= row[~lost].min() for row, lost in zip(rows, gone, strict=True))


def test_the_plan_states_its_costs_and_survives_json():
    plan, _ = plan_for()
    assert plan.note == "" and plan.skipped == FOUND.skipped
    assert plan.macs_before == count_macs(Net(), X) and plan.params_before == count_params(Net())
    assert abs(plan.macs_after / plan.macs_before - 0.5) <= 0.01
    assert from_json(PruningPlan, to_json(plan)) == plan


def test_a_budget_in_parameters():
    plan, _ = plan_for(0.6, metric="params")
    assert plan.params_after / plan.params_before == pytest.approx(0.4, abs=0.01)


def test_a_step_too_coarse_for_the_budget_gives_the_nearest_and_says_so():
    plan, _ = plan_for(0.6, metric="channels")  # 38.4 of 96 channels in steps of 4
    assert sum(g.keep for g in plan.groups) == 40
    assert "asked to remove 60.0% of channels, the nearest found is 58.3%" in plan.note
    assert "too coarse" in plan.note


def test_an_unreachable_budget_gives_the_floor_and_says_so():
    plan, _ = plan_for(0.95, min_keep=0.5)
    assert [g.keep for g in plan.groups] == [16, 32]
    reached = 1 - plan.macs_after / plan.macs_before
    assert f"the nearest that the structure allows is {reached:.1%}" in plan.note
    assert "every group is at its floor and 1 groups stay whole. Lower min_keep or the ratio." in plan.note
    assert plan_for(0.99, min_keep=0.0)[0].note.endswith(
        "every group is at its floor and 1 groups stay whole. Lower the ratio."
    )


def test_whole_widths_inside_the_budgets_tolerance_are_found():
    def land_at(widths: list[int], ratio: float) -> float:
        layers: list[nn.Module] = []
        for before, after in zip([3, *widths], [*widths, 10], strict=True):
            layers += [nn.Conv2d(before, after, 1), nn.ReLU()]
        model = nn.Sequential(*layers)
        groups = [chain_group(2 * i, width) for i, width in enumerate(widths)]
        cost = cost_model(model, X, groups)
        keep = allocate(
            Analysis(GroupSearch(tuple(groups), ()), cost, None, {}),
            PruningSection(allocation="uniform"),
            (1 - ratio) * cost.macs({}),
        )
        return 1 - cost.macs(keep) / cost.macs({})

    for widths, ratio in (([16, 32], 0.436), ([64, 16], 0.219)):
        assert land_at(widths, ratio) == pytest.approx(ratio, abs=0.01), (widths, ratio)


def chain_group(position: int, width: int) -> ChannelGroup:
    every = tuple(range(width))
    parts = (GroupSlice(str(position), "out", every, every), GroupSlice(str(position + 2), "in", every, every))
    return ChannelGroup(str(position), width, parts)


def test_floors_are_shares_of_the_dense_model_in_later_cuts():
    later = dataclasses.replace(GROUPS[0], dense=2 * GROUPS[0].channels)
    assert (floor_of(GROUPS[0], 0.25), floor_of(later, 0.25)) == (8, 16)
    assert floor_of(later, 0.9) == later.channels


@pytest.mark.parametrize("ratio", [1.5, 0.0, 1.0, -0.2, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(UsageError, match=rf"ratio must be in \(0, 1\), got {ratio}\. Try 0\.5\."):
        plan_for(ratio)


def test_nothing_to_cut():
    empty = GroupSearch((), FOUND.skipped)
    with pytest.raises(UsageError, match="no group of channels that can be cut: odd: its index mapping"):
        make_plan(Analysis(empty, cost_model(Net(), X, ()), None, {}), PruningSection(allocation="uniform"))


@pytest.mark.parametrize("width", [80, 120])
def test_table(width):
    plan, _ = plan_for(0.95, min_keep=0.5)
    long = dataclasses.replace(plan.groups[0], name="backbone.stages.2.blocks.17.attention.projection.conv1")
    plan = dataclasses.replace(plan, groups=(long, plan.groups[1]))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_plan(plan))
    text = console.export_text()
    for expected in ("remove 95% of macs", " 32 ", " 16 ", "50%", "odd", "broken", "MACs", "parameters", "nearest"):
        assert expected in text
    assert ("██████░░░░░░" in text) == (width == 120)
    columns = 7 if width == 120 else 6
    cells = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.count("│") == columns)
    assert long.name in cells and max(map(len, text.splitlines())) <= width


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    x = torch.zeros(1, 3, 32, 32)
    found = find_groups(model, x)
    return model, x, found, cost_model(model, x, found.groups)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_budgets_on_resnet18(resnet, ratio):
    model, _, found, cost = resnet
    scores = channel_scores(model, found.groups, "magnitude")
    fractions = {g.name: removed_fraction_curve(model, g, scores[g.name]) for g in found.groups}
    profile = profile_of(found.groups, [0.09 * 1.5**i for i in range(len(found.groups))])
    plan = make_plan(Analysis(found, cost, profile, scores, fractions), PruningSection(ratio=ratio))
    assert plan.note == "" and abs(1 - plan.macs_after / plan.macs_before - ratio) <= 0.01
    assert all(g.keep % 8 == 0 for g in plan.groups)


def test_predicted_costs_are_those_of_the_real_cut(resnet):
    model, x, found, cost = resnet
    scores = channel_scores(model, found.groups, "random")
    plan = make_plan(Analysis(found, cost, None, scores), PruningSection(ratio=0.6, allocation="uniform"))
    small = apply(model, plan, x).model
    assert (count_macs(small, x), count_params(small)) == (plan.macs_after, plan.params_after)
