"""Statistics of timings: medians and paired ratios with bootstrap intervals, and tail percentiles.

Samples are arrays ``[launches, blocks, runs]``. In a block every arm is timed once, in random order, so that drift of
the machine (clocks, other processes, temperature) affects all arms of a block alike. In each launch every arm runs in a
new process. The bootstrap resamples launches, and blocks within launches, but not runs, since the runs of a block are
correlated, and so are, to a lesser degree, the blocks of a launch. If launches do not differ, the intervals are
conservative.
"""

from __future__ import annotations

import numpy as np

from .types import Ratio

RESAMPLES = 2000
CONFIDENCE = 0.95
# With fewer samples, at most one of them lies above the true percentile with a probability above 1 %, and the estimate
# would depend on the extremes.
MIN_SAMPLES = {90: 64, 95: 130, 99: 662}

Interval = tuple[float, float, float]


def median_interval(samples: np.ndarray, seed: int = 0) -> Interval:
    """Return the median of samples [launches, blocks, runs] and its 95 % bootstrap interval, in the samples' unit."""
    medians = np.median(_resampled(samples, seed).reshape(RESAMPLES, -1), axis=1)
    return (float(np.median(samples)), *_quantiles(medians))


def paired_ratio(base: np.ndarray, arm: np.ndarray, seed: int = 0) -> Interval:
    """Return the ratio base / arm, which is above 1 if the arm is faster, and its 95 % paired bootstrap interval.

    The estimate is the median over blocks of the ratio of the two block medians.

    Args:
        base, arm: times [launches, blocks, runs] of two arms; their entries [l, b] are from the same block.
        seed: random seed of the bootstrap.
    """
    logs = np.log(np.median(base, axis=2)) - np.log(np.median(arm, axis=2))
    medians = np.median(_resampled(logs, seed).reshape(RESAMPLES, -1), axis=1)
    low, high = _quantiles(medians)
    return float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high))


def percentile(samples: np.ndarray, q: int) -> float | None:
    """Return the q-th percentile (q is 90, 95 or 99) of all samples, or None below 64, 130 or 662 samples."""
    if samples.size < MIN_SAMPLES[q]:
        return None
    return float(np.percentile(samples, q))


def judged(ratio: Interval, floor: Interval) -> Ratio:
    """Return the ratio with a verdict: whether its interval is outside the noise floor.

    The A/A interval is made symmetric first: if a file seems 5 % slower than itself, 5 % in both directions is noise.

    Args:
        ratio: a speed-up with its interval.
        floor: the A/A ratio with its interval.
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
    """Return whether the interval of a ratio excludes 1."""
    return interval[1] > 1 or interval[2] < 1


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Resample launches and blocks of `values` [launches, blocks, ...]: [resamples, launches, blocks, ...]."""
    rng = np.random.default_rng(seed)
    launches, blocks = values.shape[:2]
    which = rng.integers(0, launches, size=(RESAMPLES, launches, 1))
    return values[which, rng.integers(0, blocks, size=(RESAMPLES, launches, blocks))]


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
