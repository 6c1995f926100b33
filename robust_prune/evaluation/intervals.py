"""Confidence intervals of accuracies and of their differences."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Quantile of the normal distribution for two-sided intervals of 95 %."""


def wilson_interval(successes: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson, 1927), 95 % by default.

    Args:
        successes: number of successes.
        total: sample size.
        z: quantile of the normal distribution.

    Returns:
        Lower and upper bound in [0, 1]; (0, 1) for an empty sample.
    """
    if total == 0:
        return 0.0, 1.0
    p = successes / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_change(after: NDArray[np.bool_], before: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the change of a proportion on the same images as a bound uses it, and its standard deviation.

    Half an observation is added to each of the four kinds of pairs (Agresti and Min, 2005), so that a few images which
    all agree prove little. Images on which both models agree do not widen the interval.

    Args:
        after, before: whether each image is classified correctly by either model, bool [N].

    Returns:
        The adjusted change in (-1, 1), and the standard deviation of the change on one image; that of the mean of N
        images is smaller by the square root of N + 2.
    """
    won, lost = float((after & ~before).sum()) + 0.5, float((before & ~after).sum()) + 0.5
    count = len(after) + 2
    change = (won - lost) / count
    return change, math.sqrt((won + lost) / count - change**2)


def paired_interval(after: NDArray[np.bool_], before: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the 95 % interval of the change of an accuracy on the same images, in [-1, 1]; see `paired_change`."""
    change, deviation = paired_change(after, before)
    spread = Z95 * deviation / math.sqrt(len(after) + 2)
    return max(-1.0, change - spread), min(1.0, change + spread)
