"""Channels are removed where the loss of robustness, measured at real cuts, is smallest for the cost that is saved.

As `mrs`, with other losses: each group is cut alone to some widths and repaired, and the robust loss of the cut model
is measured under attack (`cut_losses`). A rise below its own standard error counts as this error. Between the measured
widths the logarithm of the loss is linear in that of the width, and below them it goes on; above them the loss grows
with the square of the number of removed channels. The result is replaced by its lower convex hull.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...structure.types import ChannelGroup
from ..allocation import Floats, Problem, Wish
from ..cut_losses import CutLoss
from .mrs import equal_prices, lower_hull

_LEAST_LOSS = 1e-4
_LEAST_WIDTH = 0.5
"""Width that stands for none where logarithms are taken."""


def wished_widths(problem: Problem) -> Wish:
    """Return the widths of the constrained optimum, and the expected losses.

    Raises:
        UsageError: the losses of real cuts are missing.
    """
    measured = problem.needs(
        "losses of real cuts (analyse measures them with pruning.allocation=cuts)", problem.cut_losses
    )
    problem.covered(measured, "losses of real cuts")
    losses = [loss_by_width(group, measured[group.name]) for group in problem.groups]
    return Wish(equal_prices(losses, problem), losses)


def loss_by_width(group: ChannelGroup, measured: Sequence[CutLoss]) -> Floats:
    """Return the loss of a group in nats at each kept count 0..channels, [channels + 1], convex and not increasing."""
    cuts = sorted((cut for cut in measured if cut.keep), key=lambda cut: cut.keep)
    widths = np.array([cut.keep for cut in cuts], dtype=np.float64)
    found = np.array([max(cut.rise, cut.error, _LEAST_LOSS) for cut in cuts])
    found = np.maximum.accumulate(found[::-1])[::-1]
    keep = np.arange(group.channels + 1.0)
    inside = np.maximum(keep, _LEAST_WIDTH)
    loss = np.exp(np.interp(np.log(inside), np.log(widths), np.log(found)))
    steepest = -1.0
    if len(widths) > 1:
        steepest = min(steepest, float(np.log(found[1] / found[0]) / np.log(widths[1] / widths[0])))
    below, above = keep < widths[0], keep > widths[-1]
    loss[below] = found[0] * (inside[below] / widths[0]) ** steepest
    loss[above] = found[-1] * ((group.channels - keep[above]) / (group.channels - widths[-1])) ** 2
    return lower_hull(loss[::-1])[::-1].copy()


def loss_without(measured: Sequence[CutLoss]) -> float:
    """Return the loss in nats of taking out a branch, which was measured without its channels."""
    (cut,) = (cut for cut in measured if not cut.keep)
    return max(cut.rise, cut.error, _LEAST_LOSS)
