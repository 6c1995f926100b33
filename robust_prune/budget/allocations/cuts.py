"""Channels are removed where real cuts change the answers to attacked images least for the cost that is saved.

As `mrs`, with other losses: each group is cut alone to some widths and repaired, and the divergence of the cut model's
predictions from the dense model's is measured on adversarial images (`cut_losses`). A divergence below its standard
error counts as this error. Between the measured widths the logarithm of the loss is linear in that of the width, and
below them it goes on; above them the loss grows with the square of the number of removed channels. The result is
replaced by its lower convex hull.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...structure.types import ChannelGroup
from ..allocation import Floats, Problem, Wish
from ..cut_losses import CutLoss, CutLosses
from ..rounding import TOLERANCE
from .mrs import equal_prices, lower_hull

_LEAST_LOSS = 1e-4
_LEAST_WIDTH = 0.5
"""Width that stands for none where logarithms are taken."""


def wished_widths(problem: Problem) -> Wish:
    """Return the widths of the constrained optimum, 0 for branches that go whole, and the expected losses.

    Raises:
        UsageError: the losses of real cuts are missing.
    """
    measured = problem.needs(
        "losses of real cuts (analyse measures them with pruning.allocation=cuts)", problem.cut_losses
    )
    problem.covered(measured, "losses of real cuts")
    left = _without_branches(problem, measured)
    losses = _losses(problem, measured)
    widths = np.zeros(len(losses))
    kept = [group.name for group in left.groups]
    at = [i for i, group in enumerate(problem.groups) if group.name in kept]
    widths[at] = equal_prices([losses[i] for i in at], left) if at else 0.0
    return Wish(widths, losses)


def _losses(problem: Problem, measured: CutLosses) -> list[Floats]:
    return [loss_by_width(group, measured[group.name]) for group in problem.groups]


def loss_by_width(group: ChannelGroup, measured: Sequence[CutLoss]) -> Floats:
    """Return the loss of a group in nats at each kept count 0..channels, [channels + 1], convex and not increasing."""
    cuts = sorted((cut for cut in measured if cut.keep), key=lambda cut: cut.keep)
    widths = np.array([cut.keep for cut in cuts], dtype=np.float64)
    found = np.array([max(cut.divergence, cut.error, _LEAST_LOSS) for cut in cuts])
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
    return max(cut.divergence, cut.error, _LEAST_LOSS)


def _without_branches(problem: Problem, measured: CutLosses) -> Problem:
    """Return the problem without the groups of branches whose removal lowers the expected loss at this budget.

    Branches go one by one, each time the one after which the expected loss of the real-valued widths and of all removed
    branches is lowest, as long as it falls. While not even the smallest widths meet the budget, the one goes that costs
    the least loss for what it saves there.

    Args:
        problem: the problem of all groups.
        measured: losses of real cuts, which contain those without the branches.
    """
    least = problem.budget - TOLERANCE * problem.form.value(problem.dense)
    gone, paid, best = problem, 0.0, _expected(problem, measured, least)
    left = {name: branch for name, branch in problem.branches.items() if problem.section.branches}
    while left:
        tries = {}
        for name, branch in left.items():
            smaller = gone.without({g.name for g in gone.groups if branch.modules.issuperset(g.producers)})
            cost = loss_without(measured[name])
            tries[name] = smaller, paid + cost, paid + cost + _expected(smaller, measured, least)
        name = min(tries, key=lambda name: tries[name][2])
        if tries[name][2] == float("inf") and gone.form.value(gone.floors) > problem.budget:
            # Not even the smallest widths are within the budget, and one branch less does not bring them there.
            saved = {n: gone.form.value(gone.floors) - t[0].form.value(t[0].floors) for n, t in tries.items()}
            name = min(tries, key=lambda n: loss_without(measured[n]) / max(saved[n], 1e-9))
        elif tries[name][2] >= best:
            break
        gone, paid, best = tries[name]
        names = {group.name for group in gone.groups}
        left = {name: branch for name, branch in left.items() if name in names}
    return gone


def _expected(problem: Problem, measured: CutLosses, least: float) -> float:
    """Return the expected loss of the real-valued widths, or infinity if no widths cost from `least` to the budget."""
    if not problem.groups or problem.form.value(problem.dense) < least:
        return float("inf")
    losses = _losses(problem, measured)
    widths = equal_prices(losses, problem)
    if problem.form.value(widths) > problem.budget * (1 + TOLERANCE):
        return float("inf")
    return sum(float(np.interp(width, np.arange(len(loss)), loss)) for width, loss in zip(widths, losses, strict=True))
