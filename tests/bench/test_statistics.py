"""What timings allow one to say: the statistics on made-up samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_prune.bench import statistics
from robust_prune.bench.statistics import judged, median_interval, paired_ratio, percentile


def drifting(rng: np.random.Generator, blocks: int = 30, runs: int = 5, launches: int = 1) -> np.ndarray:
    """The machine's speed by block: it wanders by tens of percent, alike for all arms of a block."""
    wander = np.exp(np.cumsum(rng.normal(0, 0.05, launches * blocks)))
    return wander.reshape(launches, blocks, 1) * np.ones(runs)


def noisy_times(rng: np.random.Generator, drift: np.ndarray, typical: float) -> np.ndarray:
    """Times with a heavy right tail, as schedulers make them."""
    return typical * drift * np.exp(rng.normal(0, 0.03, drift.shape)) * (1 + rng.exponential(0.02, drift.shape))


def test_a_known_ratio_is_recovered_through_drift() -> None:
    rng = np.random.default_rng(0)
    drift = drifting(rng, blocks=60)
    value, low, high = paired_ratio(noisy_times(rng, drift, 3.0), noisy_times(rng, drift, 2.0))
    assert low < 1.5 < high and value == pytest.approx(1.5, rel=0.02)
    assert high - low < 0.06


def test_interval_of_a_file_against_itself_holds_one_about_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    repeats = 300
    misses = 0
    for _ in range(repeats):
        drift = drifting(rng)
        interval = paired_ratio(noisy_times(rng, drift, 1.0), noisy_times(rng, drift, 1.0))
        misses += statistics.excludes_one(interval)
    assert 0.01 < misses / repeats < 0.085


def test_interval_holds_one_though_a_process_may_be_slower_than_its_twin_for_as_long_as_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(3)
    repeats, misses, blind = 200, 0, 0
    for _ in range(repeats):
        drift = drifting(rng, launches=5)
        a, b = (noisy_times(rng, drift * np.exp(rng.normal(0, 0.006, (5, 1, 1))), 1.0) for _ in range(2))
        misses += statistics.excludes_one(paired_ratio(a, b))
        blind += statistics.excludes_one(paired_ratio(a.reshape(1, 150, 5), b.reshape(1, 150, 5)))
    assert misses / repeats < 0.11 < 0.17 < blind / repeats


def test_interval_of_the_median_covers_it() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        _, low, high = median_interval(rng.lognormal(1.0, 0.2, (1, 25, 4)))
        held += low <= np.e <= high
    assert 0.90 <= held / 200 <= 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 5.0))
def test_swapping_the_arms_inverts_the_ratio(seed: int, typical: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.lognormal(0, 0.2, (2, 7, 3)), typical * rng.lognormal(0, 0.2, (2, 7, 3))
    value, low, high = paired_ratio(a, b)
    back = paired_ratio(b, a)
    assert low <= value <= high
    np.testing.assert_allclose([back[0], back[1], back[2]], [1 / value, 1 / high, 1 / low])


@pytest.mark.parametrize("q", [90, 95, 99])
def test_a_percentile_needs_the_samples_that_its_rule_names(q: int) -> None:
    least, p = statistics.MIN_SAMPLES[q], q / 100

    def chance_of_at_most_one_above(n: int) -> float:
        return p**n + n * (1 - p) * p ** (n - 1)

    assert chance_of_at_most_one_above(least) <= 0.01 < chance_of_at_most_one_above(least - 1)
    assert percentile(np.ones(least - 1), q) is None
    assert percentile(np.arange(1001.0), q) == 10 * q


@pytest.mark.parametrize(
    ("ratio", "floor", "verdict"),
    [
        ((1.5, 1.4, 1.6), (1.0, 0.99, 1.01), "faster"),
        ((0.7, 0.6, 0.8), (1.0, 0.99, 1.01), "slower"),
        ((1.02, 1.005, 1.03), (1.0, 0.99, 1.01), "no difference"),
        ((1.0, 0.9, 1.1), (1.0, 1.0, 1.0), "no difference"),
        # A file that seems 10 % slower than itself says that 10 % faster is noise too.
        ((1.06, 1.05, 1.08), (0.92, 0.9, 0.95), "no difference"),
        ((0.94, 0.92, 0.95), (1.08, 1.05, 1.1), "no difference"),
    ],
)
def test_only_what_exceeds_the_noise_floor_is_a_difference(
    ratio: tuple[float, float, float], floor: tuple[float, float, float], verdict: str
) -> None:
    assert judged(ratio, floor).verdict == verdict
