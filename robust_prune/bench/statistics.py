"""What timings allow us to say: medians with intervals, percentiles only with enough samples, paired ratios.

Samples arrive as ``[launches, blocks, runs]``: within a block every arm is visited once, in random order, so drift of
the machine (clocks, neighbours, temperature) hits all arms of a block alike; at a launch every arm gets a new process.
The bootstrap resamples launches, and blocks within them, not samples: those of a block are correlated, and so are, less
so, the blocks of a launch. Where launches do not differ, the interval is wider than it need be.
"""

from __future__ import annotations

import numpy as np

from .types import Ratio

RESAMPLES = 2000
CONFIDENCE = 0.95
# With fewer, the chance that at most one sample lies above the true percentile exceeds 1 %, and the
# estimate would be made of the extremes.
MIN_SAMPLES = {90: 64, 95: 130, 99: 662}

Interval = tuple[float, float, float]


def median_interval(samples: np.ndarray, seed: int = 0) -> Interval:
    """Median of all samples [launches, blocks, runs] with its 95 % bootstrap interval, in the samples' unit."""
    medians = np.median(_resampled(samples, seed).reshape(RESAMPLES, -1), axis=1)
    return (float(np.median(samples)), *_quantiles(medians))


def paired_ratio(base: np.ndarray, arm: np.ndarray, seed: int = 0) -> Interval:
    """Ratio base / arm (above 1: the arm is faster) with its 95 % paired bootstrap interval.

    The estimate is the median over blocks of the ratio of the two block medians.

    Args:
        base, arm: times [launches, blocks, runs] of two arms, entry [l, b] of both taken in the same block.
        seed: of the bootstrap.
    """
    logs = np.log(np.median(base, axis=2)) - np.log(np.median(arm, axis=2))
    medians = np.median(_resampled(logs, seed).reshape(RESAMPLES, -1), axis=1)
    low, high = _quantiles(medians)
    return float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high))


def percentile(samples: np.ndarray, q: int) -> float | None:
    """The q-th percentile (q is 90, 95 or 99) of all samples, or None when there are too few of them."""
    if samples.size < MIN_SAMPLES[q]:
        return None
    return float(np.percentile(samples, q))


def judged(ratio: Interval, floor: Interval) -> Ratio:
    """Says whether a ratio differs from 1 by more than a file differs from itself.

    The A/A interval is made symmetric before it is used: a file that seems 5 % slower than itself says that
    5 % either way is noise.
    """
    value, low, high = ratio
    width = max(floor[1], floor[2], 1 / floor[1], 1 / floor[2])
    verdict = "no difference"
    if low > width:
        verdict = "faster"
    elif high < 1 / width:
        verdict = "slower"
    return Ratio(value, low, high, verdict)


def excludes_one(interval: Interval) -> bool:
    """Whether the interval of a ratio leaves 1 out."""
    return interval[1] > 1 or interval[2] < 1


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """`values` [launches, blocks, ...] resampled on both levels, [resamples, launches, blocks, ...]."""
    rng = np.random.default_rng(seed)
    launches, blocks = values.shape[:2]
    which = rng.integers(0, launches, size=(RESAMPLES, launches, 1))
    return values[which, rng.integers(0, blocks, size=(RESAMPLES, launches, blocks))]


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
