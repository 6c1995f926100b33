"""The search for a latency, with a clock that tells what it is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from robust_prune.budget.latency import AIM, MOST_CANDIDATES, Tried, next_share


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
