"""The search for a latency and the plan that it ends with, with a clock that tells what it is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders.plans import analysed
from builders.surgery_models import example
from torch import nn

from robust_prune.budget.analysis import Analysis
from robust_prune.budget.latency_search import AIM, MOST_CANDIDATES, TOLERANCE, Tried, next_share, plan_for_latency
from robust_prune.budget.types import PruningPlan
from robust_prune.recipe import PruningSection


def searched(latency: Callable[[float], float], wanted: float) -> list[Tried]:
    tried = [Tried(0.0, latency(0.0))]
    while (share := next_share(tried, wanted)) is not None:
        tried.append(Tried(share, latency(share)))
    return tried


@pytest.mark.parametrize("wanted", [0.8, 0.5, 0.3])
@pytest.mark.parametrize(
    "latency",
    [lambda r: 1 - r, lambda r: 0.2 + 0.8 * (1 - r), lambda r: (1 - r) ** 2, lambda r: (1 - r) ** 0.6],
    ids=["proportional", "with overhead", "falls fast", "falls slowly"],
)
def test_the_search_lands_in_a_few_candidates(latency: Callable[[float], float], wanted: float) -> None:
    tried = searched(latency, wanted)
    assert min(abs(t.kept / wanted - 1) for t in tried) <= AIM
    assert len(tried) <= MOST_CANDIDATES


def test_the_search_ends_where_nothing_is_fast_enough_or_nothing_lies_between() -> None:
    slow = searched(lambda r: 0.7 + 0.3 * (1 - r), 0.5)
    assert slow[-1].removed > 0.95 and len(slow) <= MOST_CANDIDATES + 1
    steps = searched(lambda r: 1.0 if r < 0.4 else 0.3, 0.5)
    assert {t.kept for t in steps} == {1.0, 0.3} and len(steps) <= MOST_CANDIDATES + 1
    # A noisy clock that contradicts itself is no reason to go on for ever.
    assert next_share([Tried(0, 1), Tried(0.6, 0.7), Tried(0.5, 0.4)], 0.5) is None
    # What earlier cuts left may be fast enough already.
    assert next_share([Tried(0, 0.3)], 0.5) is None


@pytest.mark.parametrize(("fast", "slow", "share"), [(0.48, 1.0, 0.9), (0.1, 0.52, 0.1), (0.25, 0.75, 0.5)])
def test_a_candidate_keeps_its_distance_from_those_that_are_known(fast: float, slow: float, share: float) -> None:
    tried = [Tried(0.1, 1.0), Tried(0.2, slow), Tried(0.6, fast), Tried(0.9, 0.05)]
    assert next_share(tried, 0.5) == pytest.approx(0.2 + 0.4 * share)


# --- the plan ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(),
        nn.Conv2d(48, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    return analysed(model, example(), [0.02, 3.0, 0.3])


def left(plan: PruningPlan) -> float:
    return plan.macs_after / plan.macs_before


def planned(
    analysis: Analysis, wanted: float, clock: Callable[[float], float], present: float = 1.0, **section: object
) -> tuple[PruningPlan, list[PruningPlan]]:
    """The plan for a latency, and all that were timed, where the clock is a function of the MACs that are left."""
    timed: list[PruningPlan] = []
    settings = PruningSection(**{"metric": "latency", "ratio": 1 - wanted, "round_to": 1, **section})
    plan = plan_for_latency(
        analysis, settings, wanted, present, lambda plan: timed.append(plan) or clock(left(plan)), "batch 1"
    )
    return plan, timed


@pytest.mark.parametrize("wanted", [0.8, 0.5, 0.3])
def test_the_plan_is_that_whose_file_comes_nearest(
    analysis: Analysis, wanted: float, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, timed = planned(analysis, wanted, lambda macs: 0.1 + 0.9 * macs**1.3)
    reached = [0.1 + 0.9 * left(candidate) ** 1.3 for candidate in timed]
    nearest = min(range(len(timed)), key=lambda i: abs(reached[i] / wanted - 1))
    assert plan.groups == timed[nearest].groups and abs(reached[nearest] / wanted - 1) <= AIM
    assert (plan.metric, plan.ratio, plan.note) == ("latency", pytest.approx(1 - wanted), "")
    assert all(candidate.metric == "macs" for candidate in timed)
    told = capsys.readouterr().out.splitlines()
    assert told[1:] == [
        f"  {1 - left(candidate):.1%} of the MACs removed: {kept:.1%} of the latency"
        for candidate, kept in zip(timed, reached, strict=True)
    ]


def test_the_search_goes_on_from_the_cut_that_is_really_made(analysis: Analysis) -> None:
    """Wide steps take more or less than they were asked for: what counts is what they took."""
    plan, timed = planned(analysis, 0.6, lambda macs: macs, round_to=16)
    assert abs(left(plan) / 0.6 - 1) <= TOLERANCE and plan.note == ""
    assert len({candidate.groups for candidate in timed}) == len(timed) <= MOST_CANDIDATES


def test_no_candidate_is_timed_twice_where_the_structure_has_few_steps(analysis: Analysis) -> None:
    _, timed = planned(analysis, 0.55, lambda macs: 1.0 if macs > 0.5 else 0.3, min_keep=0.5, round_to=32)
    assert len({candidate.groups for candidate in timed}) == len(timed)


def test_the_search_stops_at_the_most_that_can_be_cut_and_says_what_was_reached(analysis: Analysis) -> None:
    plan, timed = planned(analysis, 0.3, lambda macs: 0.5 + 0.5 * macs, min_keep=0.5)
    kept = 0.5 + 0.5 * left(plan)
    assert plan.groups == timed[-1].groups and all(group.keep == group.channels // 2 for group in plan.groups)
    assert len(timed) <= 2, "nothing more can be cut, and still it was tried"
    assert plan.note.startswith(
        f"asked for 30.0% of the dense latency (batch 1), the nearest that was found is {kept:.1%}. asked to remove"
    )
    assert "every group is at its floor" in plan.note


def test_a_later_cut_starts_from_the_latency_that_earlier_ones_left(analysis: Analysis) -> None:
    plan, timed = planned(analysis, 0.4, lambda macs: 0.8 * macs, present=0.8)
    assert left(timed[0]) == pytest.approx(0.5, abs=0.02) and len(timed) == 1
    assert plan.groups == timed[0].groups and plan.note == ""


@pytest.mark.parametrize(("present", "note"), [(0.598, ""), (0.5, "the nearest that was found is 50.0%.")])
def test_where_earlier_cuts_did_it_all_the_smallest_step_is_planned(
    analysis: Analysis, present: float, note: str
) -> None:
    plan, timed = planned(analysis, 0.6, lambda macs: pytest.fail("timed"), present=present)
    assert timed == [] and 0.97 < left(plan) <= 1 and (plan.metric, plan.ratio) == ("latency", pytest.approx(0.4))
    assert note in plan.note and bool(plan.note) == bool(note)
