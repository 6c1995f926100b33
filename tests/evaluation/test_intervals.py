"""Paired intervals of changes of accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_prune.evaluation.card import Accuracy
from robust_prune.evaluation.intervals import paired_interval
from robust_prune.report.text import NOT_TOLD_APART, points
from robust_prune.serialization import from_json, to_json


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_verdicts_survive_json(right: list[bool]) -> None:
    found = Accuracy.of(np.array(right))
    assert (found.correct, found.total) == (sum(right), len(right))
    again = from_json(Accuracy, to_json(found))
    assert again == found and again.verdicts.tolist() == right
    assert "right" not in repr(found)


@pytest.mark.parametrize(("correct", "total", "right"), [(3, 8, "AA=="), (3, 8, "4A"), (3, 80, "4A=="), (3, 8, "é")])
def test_verdicts_that_do_not_fit_their_number_are_refused(correct: int, total: int, right: str) -> None:
    with pytest.raises(ValueError):
        from_json(Accuracy, {"correct": correct, "total": total, "right": right})
    assert (
        from_json(Accuracy, {"correct": 3, "total": 8, "right": "4A=="}).verdicts.tolist() == [True] * 3 + [False] * 5
    )


def test_agreement_narrows_the_interval_of_a_change() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(2000) < 0.42
    same = before ^ (rng.random(2000) < 0.02)
    other = rng.random(2000) < 0.42
    narrow, wide = (np.diff(paired_interval(after, before))[0] for after in (same, other))
    assert narrow < wide / 4
    low, high = paired_interval(np.ones(3, bool), np.ones(3, bool))
    assert low < 0 < high


def test_the_interval_covers_the_true_change_in_95_of_100_samples() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(600):
        u, v = rng.random(300), rng.random(300)
        before, after = u < 0.42, np.where(v < 0.8, u < 0.40, v < 0.88)
        true = 0.8 * 0.40 + 0.08 - 0.42
        low, high = paired_interval(after, before)
        inside += low <= true <= high
    assert 0.93 * 600 <= inside <= 0.98 * 600


def test_a_change_that_may_be_none_is_said_so() -> None:
    before = np.arange(400) < 168
    same, worse = before.copy(), before & (np.arange(400) >= 40)
    same[:2] = False
    assert points(Accuracy.of(same), Accuracy.of(before)).startswith(f"{NOT_TOLD_APART}, −0.5 points [−")
    assert points(Accuracy.of(worse), Accuracy.of(before)).startswith("−10.0 points [−")
    assert points(Accuracy(40, 100), Accuracy.of(before)) == "−2.0 points"
    assert points(Accuracy.of(before[:100]), Accuracy.of(before)).count("[") == 0
