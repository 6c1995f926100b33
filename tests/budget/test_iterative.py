"""Several cuts: the share of each, and what they come to together."""

from __future__ import annotations

import dataclasses

import pytest

from robust_prune.budget.iterative import compose, dense_widths, realised, remaining_ratio
from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.errors import UsageError


def plan(before: int, after: int, *groups: PlannedGroup, metric: str = "macs") -> PruningPlan:
    return PruningPlan(0.3, metric, "mrs", "adversarial_taylor", 8, groups, (), before, after, 2 * before, 2 * after)


def test_equal_shares_remain_after_each_cut() -> None:
    assert remaining_ratio((), 0.75, "macs", 1) == pytest.approx(0.75)
    first = remaining_ratio((), 0.75, "macs", 2)
    assert first == pytest.approx(0.5)
    assert remaining_ratio((plan(1000, 500),), 0.75, "macs", 2) == pytest.approx(0.5)


def test_the_last_cut_makes_good_what_earlier_ones_missed() -> None:
    for after in (450, 560):
        ratio = remaining_ratio((plan(1000, after),), 0.75, "macs", 2)
        assert after * (1 - ratio) == pytest.approx(250)
    # An earlier cut took more than all: the last one takes next to nothing, but something.
    assert 0 < remaining_ratio((plan(1000, 200),), 0.75, "macs", 2) < 1e-3
    with pytest.raises(UsageError, match="only 1 are planned"):
        remaining_ratio((plan(1000, 500),), 0.5, "macs", 1)


@pytest.mark.parametrize("metric", ["params", "channels"])
def test_other_costs_are_counted_in_their_own_unit(metric: str) -> None:
    made = plan(1000, 800, PlannedGroup("a", 10, (0, 1), 1.0), metric=metric)
    assert 0.8 * (1 - remaining_ratio((made,), 0.5, metric, 2)) == pytest.approx(0.5)


def test_cuts_add_up_in_channels_of_the_dense_model() -> None:
    first = plan(1000, 600, PlannedGroup("a", 8, (1, 4), 0.5), PlannedGroup("b", 4, (), 0.7))
    second = plan(600, 480, PlannedGroup("a", 6, (0, 5), 9.0))
    third = plan(480, 400, PlannedGroup("a", 4, (1,), 9.0), PlannedGroup("b", 4, (3,), 9.0))
    whole = compose([first, second, third], 0.6)
    # Left of a after the first cut: 0 2 3 5 6 7, after the second: 2 3 5 6, after the third: 2 5 6.
    assert [(g.name, g.removed, g.mrs) for g in whole.groups] == [("a", (0, 1, 3, 4, 7), 0.5), ("b", (3,), 0.7)]
    assert (whole.macs_before, whole.macs_after, whole.params_after, whole.ratio) == (1000, 400, 800, 0.6)
    assert whole.note == ""
    said = compose([first, second, dataclasses.replace(third, note="One channel is too coarse.")], 0.5).note
    assert said == "asked to remove 50.0% of macs, 3 cuts came to 60.0%. One channel is too coarse."


def test_one_cut_is_itself_and_misfits_are_refused() -> None:
    first = plan(1000, 600, PlannedGroup("a", 8, (1, 4), 0.5))
    assert compose([first], 0.4) is first
    with pytest.raises(UsageError, match="'a' has 8 channels in a later cut, but 6 were left"):
        compose([first, first], 0.4)
    with pytest.raises(UsageError, match="no cut"):
        compose([], 0.4)


def test_a_budget_that_is_missed_because_a_group_was_rolled_back_is_said() -> None:
    made = plan(1000, 700, PlannedGroup("a", 8, (1, 4), 0.5), PlannedGroup("b", 4, (0, 1), 0.7))
    found = realised(made, {"b"}, 850, 1700)
    assert found.note == "asked to remove 30.0% of macs; groups were rolled back, which leaves 15.0%."
    assert realised(made, {"b"}, 705, 1700).note == "" and realised(made, (), 850, 1700) is made


def test_a_group_that_was_rolled_back_counts_as_whole_in_the_cuts_that_follow() -> None:
    first = plan(1000, 600, PlannedGroup("a", 8, (1, 4), 0.5), PlannedGroup("b", 4, (0, 1), 0.7))
    real = realised(first, {"b"}, 700, 1400)
    assert [(g.name, g.keep) for g in real.groups] == [("a", 6), ("b", 4)]
    assert (real.macs_after, real.params_after) == (700, 1400)
    assert realised(first, (), 1, 1) is first
    second = plan(
        700, 500, PlannedGroup("a", 6, (0,), 9.0), PlannedGroup("b", 4, (2,), 9.0), PlannedGroup("c", 3, (1,), 9.0)
    )
    whole = compose([real, second], 0.5)
    assert [(g.name, g.removed) for g in whole.groups] == [("a", (0, 1, 4)), ("b", (2,)), ("c", (1,))]
    assert dense_widths([real, second]) == {"a": 8, "b": 4, "c": 3}
    assert remaining_ratio((real,), 0.5, "macs", 2) == pytest.approx(1 - 500 / 700)


def test_a_latency_is_what_the_last_cut_says_of_it() -> None:
    first = plan(1000, 600, PlannedGroup("a", 8, (1, 4), 0.5), metric="latency")
    second = dataclasses.replace(plan(600, 480, PlannedGroup("a", 6, (0, 5), 9.0), metric="latency"), note="as near")
    assert compose([first, second], 0.4).note == "as near"  # 52 % of the MACs went, which nobody had asked for
    assert compose([first, dataclasses.replace(second, note="")], 0.4).note == ""
