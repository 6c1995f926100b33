"""Rounding of real-valued widths to integers, multiples of `round_to` where possible, that meet the budget.

Every group has a list of allowed widths (multiples of `round_to` and its dense width). The search starts at the nearest
allowed widths and steps down to the budget. Then it takes single steps and exchanges between pairs of groups as long as
they lower the allocation's loss. Groups may leave the multiples only if multiples do not meet the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..structure.types import ChannelGroup
from .cost import QuadraticForm

TOLERANCE = 0.01
"""Largest deviation from the budget that meets it, as a share of the dense cost."""
_MIN_LEVELS = 4
_MAX_MOVES = 2000
_STARTS = (
    0.97,
    1.0,
    1.03,
)  # factors of the wished widths: few widths of narrow models meet the budget, and one search may miss them
_REACH = (
    1,
    2,
    4,
)  # allowed widths in a step: exchanges between low-cost and high-cost groups rarely balance one for one

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def floor_of(group: ChannelGroup, min_keep: float) -> int:
    """Return the smallest width of `group`: a share of its dense width, at least 1, a multiple of its blocks.

    Args:
        group: the group.
        min_keep: smallest kept share in [0, 1), unless that of the group is larger.
    """
    least = max(1, math.ceil(max(min_keep, group.least) * (group.dense or group.channels) - 1e-9))
    return min(group.channels, math.ceil(least / group.blocks) * group.blocks)


def allowed_widths(group: ChannelGroup, round_to: int, min_keep: float) -> Ints:
    """Return the widths that `group` may keep, ascending, int64; the last is its present width.

    They are multiples of `round_to` (halved until a narrow group has four multiples) and of the group's blocks.

    Args:
        group: the group.
        round_to: preferred multiple, at least 1.
        min_keep: smallest kept share in [0, 1).
    """
    step = round_to
    while step > 1 and group.channels < _MIN_LEVELS * step:
        step = step // 2
    step = math.lcm(step, group.blocks)
    if group.channels < _MIN_LEVELS * step:
        step = group.blocks
    floor = floor_of(group, min_keep)
    first = math.ceil(floor / step) * step
    return np.array([*range(first, group.channels, step), group.channels], dtype=np.int64)


def round_to_budget(
    groups: Sequence[ChannelGroup],
    wished: Floats,
    losses: Sequence[Floats],
    form: QuadraticForm,
    budget: float,
    *,
    round_to: int = 8,
    min_keep: float = 0.1,
) -> Ints:
    """Return integer widths that cost at most `budget`, or slightly more if none below is within `TOLERANCE`.

    If the budget is below the cost of the minimum widths, these are returned; if it is above the dense cost, nothing is
    removed.

    Args:
        groups: groups in the order of the arrays.
        wished: real-valued widths of the allocation, [groups].
        losses: loss of each group at each kept count 0..channels, [channels + 1].
        form: cost as a function of the widths.
        budget: remaining cost, in the units of `form`.
        round_to: preferred multiple of the widths, at least 1.
        min_keep: smallest kept share of each group, in [0, 1).

    Returns:
        Kept channels, int64 [groups].
    """
    tries = [_round_from(wished * scale, groups, losses, form, budget, round_to, min_keep) for scale in _STARTS]
    return min(tries, key=_Search.merit).keep.astype(np.int64)


def _round_from(
    wished: Floats,
    groups: Sequence[ChannelGroup],
    losses: Sequence[Floats],
    form: QuadraticForm,
    budget: float,
    round_to: int,
    min_keep: float,
) -> _Search:
    allowed = [allowed_widths(group, round_to, min_keep) for group in groups]
    search = _Search(groups, losses, form, budget, allowed, min_keep)
    search.place(wished)
    search.solve()
    while not search.on_budget() and (choice := search.most_helpful()) is not None:
        search.relax(choice)
        search.solve()
    if not search.on_budget() and bool((search.keep > search.floors).any()):
        for group in range(len(groups)):
            search.relax(group)
        search.solve()
    return search


@dataclass
class _Search:
    groups: Sequence[ChannelGroup]
    losses: Sequence[Floats]
    form: QuadraticForm
    budget: float
    allowed: list[Ints]
    min_keep: float
    relaxed: set[int] = field(default_factory=set)
    keep: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.dense = np.array([g.channels for g in self.groups], dtype=np.float64)
        self.band = TOLERANCE * self.form.value(self.dense)
        self.floors = np.array([floor_of(g, self.min_keep) for g in self.groups], dtype=np.float64)
        self.keep = self.dense.copy()

    @property
    def cost(self) -> float:
        return self.form.value(self.keep)

    def _loss(self) -> float:
        return sum(float(losses[int(k)]) for losses, k in zip(self.losses, self.keep, strict=True))

    def place(self, wished: Floats) -> None:
        self.keep = np.array(
            [widths[np.abs(widths - wish).argmin()] for widths, wish in zip(self.allowed, wished, strict=True)],
            dtype=np.float64,
        )

    def on_budget(self) -> bool:
        whole = bool((self.keep == self.dense).all())
        return abs(self.cost - self.budget) <= self.band or (whole and self.cost <= self.budget)

    def merit(self) -> tuple[float, int, bool, float]:
        """Return a sort key, smallest is best: deviation from the budget, groups off the multiples, overrun, loss."""
        miss = 0.0 if self.on_budget() else abs(self.cost - self.budget)
        return miss, len(self.relaxed), self.cost > self.budget, self._loss()

    def solve(self) -> None:
        self._descend()
        self._improve(-np.inf)
        self._approach()
        self._improve(self.budget - self.band / 2)

    def relax(self, group: int) -> None:
        """Allow a group every width from its minimum on, in steps of its blocks."""
        self.relaxed.add(group)
        blocks = self.groups[group].blocks
        self.allowed[group] = np.arange(self.floors[group], self.dense[group] + 1, blocks, dtype=np.int64)

    def most_helpful(self) -> int | None:
        """Return the group on multiples whose single channels bring the cost nearest to the budget, or None."""
        best, best_gap = None, abs(self.cost - self.budget) - 1e-9
        for g in range(len(self.groups)):
            if g in self.relaxed:
                continue
            counts = np.arange(self.floors[g], self.dense[g] + 1, self.groups[g].blocks)
            gap = float(np.abs(self._costs_along(g, counts) - self.budget).min())
            # Low-cost groups come closest, but within half the tolerance all groups are good enough.
            if max(gap, self.band / 2) < best_gap:
                best, best_gap = g, max(gap, self.band / 2)
        return best

    def _costs_along(self, group: int, counts: Floats) -> Floats:
        step = counts - self.keep[group]
        return self.cost + self.form.gradient(self.keep)[group] * step + self.form.quadratic[group, group] * step**2

    def _steps(self, direction: int, levels: int) -> Floats:
        """Return the change of each width to the allowed one `levels` up (1) or down (-1); NaN where there is none."""
        steps = np.full(len(self.groups), np.nan)
        for g, widths in enumerate(self.allowed):
            now = self.keep[g]
            if direction > 0:
                target = int(np.searchsorted(widths, now, "right")) + levels - 1
            else:
                target = int(np.searchsorted(widths, now, "left")) - levels
            if 0 <= target < len(widths):
                steps[g] = widths[target] - now
        return steps

    def _loss_change(self, steps: Floats) -> Floats:
        change = np.full(len(self.groups), np.nan)
        for g in np.flatnonzero(~np.isnan(steps)).tolist():
            now = int(self.keep[g])
            change[g] = self.losses[g][now + int(steps[g])] - self.losses[g][now]
        return change

    def _cost_change(self, steps: Floats) -> Floats:
        return self.form.gradient(self.keep) * steps + np.diag(self.form.quadratic) * steps**2

    def _descend(self) -> None:
        """Step down, smallest loss per cost first, until the cost is within the budget or no step is left."""
        while self.cost > self.budget:
            down = self._steps(-1, 1)
            saved = -self._cost_change(down)
            usable = saved > 0
            if not usable.any():
                return
            price = np.where(usable, self._loss_change(down) / np.where(usable, saved, 1.0), np.inf)
            best = int(np.nanargmin(price))
            self.keep[best] += down[best]

    def _improve(self, low: float) -> None:
        """Take moves that lower the loss and keep the cost between `low` and the budget, if it is there already."""
        high = max(self.budget, self.cost)
        low = min(self.cost, low)
        for _ in range(_MAX_MOVES):
            moves = self._moves()
            after = self.cost + moves.cost
            loss = np.where((after >= low) & (after <= high), moves.loss, np.inf)
            best = int(np.argmin(loss))
            if not loss[best] < -1e-9 * max(1e-12, self._loss()):
                return
            self._apply(moves, best)

    def _approach(self) -> None:
        """Raise a cost below the tolerance to within it by the moves of least loss, or as near as possible."""
        for _ in range(_MAX_MOVES):
            if self.budget - self.cost <= self.band:
                return
            moves = self._moves()
            gap = self.budget - self.cost - moves.cost  # distance to the budget after the move
            for allowed in ((gap >= 0) & (gap <= self.band), np.abs(gap) <= self.band):
                if allowed.any():
                    self._apply(moves, int(np.argmin(np.where(allowed, moves.loss, np.inf))))
                    return
            nearer = (moves.cost > 0) & (gap > 0)
            if not nearer.any():
                closest = int(np.argmin(np.abs(gap)))
                if abs(gap[closest]) < self.budget - self.cost:
                    self._apply(moves, closest)
                return
            price = np.where(nearer, moves.loss / np.where(nearer, moves.cost, 1.0), np.inf)
            self._apply(moves, int(np.argmin(price)))

    def _moves(self) -> _Moves:
        """Return all steps by each reach, and all pairs of a step up and a step down in another group."""
        n = len(self.groups)
        up = [self._steps(1, levels) for levels in _REACH]
        down = [self._steps(-1, levels) for levels in _REACH]
        ups, downs = np.concatenate(up), np.concatenate(down)
        loss_up = np.concatenate([self._loss_change(steps) for steps in up])
        loss_down = np.concatenate([self._loss_change(steps) for steps in down])
        cost_up = np.concatenate([self._cost_change(steps) for steps in up])
        cost_down = np.concatenate([self._cost_change(steps) for steps in down])
        shared = np.tile(self.form.quadratic, (len(_REACH), len(_REACH)))
        pair_cost = cost_up[:, None] + cost_down[None, :] + 2 * shared * ups[:, None] * downs[None, :]
        owner = np.tile(np.arange(n), len(_REACH))
        pair_cost[owner[:, None] == owner[None, :]] = np.nan
        pair_loss = loss_up[:, None] + loss_down[None, :]
        loss = np.concatenate([loss_up, loss_down, pair_loss.ravel()])
        cost = np.concatenate([cost_up, cost_down, pair_cost.ravel()])
        impossible = np.isnan(cost)
        loss[impossible], cost[impossible] = np.inf, np.inf
        return _Moves(ups, downs, loss, cost)

    def _apply(self, moves: _Moves, index: int) -> None:
        n, size = len(self.groups), len(moves.up)
        up, down = -1, -1
        if index < size:
            up = index
        elif index < 2 * size:
            down = index - size
        else:
            up, down = divmod(index - 2 * size, size)
        if up >= 0:
            self.keep[up % n] += moves.up[up]
        if down >= 0:
            self.keep[down % n] += moves.down[down]


@dataclass(frozen=True)
class _Moves:
    """Candidate moves: steps up, steps down (by reach, then group), then all pairs (rows up, columns down)."""

    up: Floats
    down: Floats
    loss: Floats
    cost: Floats
