"""Cuts in several steps: how much each of them takes, and what they come to together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import UsageError
from .budget import TOLERANCE
from .types import PruningPlan


def remaining_ratio(before: Sequence[PruningPlan], ratio: float, of: str, steps: int) -> float:
    """Share of the *present* model that the next cut removes, so that equal shares remain after each of `steps` cuts.

    What earlier cuts took too much or too little is made good, and the last one lands on the whole budget.

    Args:
        before: the cuts so far.
        ratio: share of the dense model's cost to remove in all, in (0, 1).
        of: ``macs``, ``params`` or ``channels``.
        steps: number of cuts, more than were made.

    Raises:
        UsageError: `steps` is not above the number of cuts made.
    """
    done = len(before)
    if not done < steps:
        raise UsageError(f"a cut number {done + 1} was asked for, but only {steps} are planned")
    if not before:
        return 1 - (1 - ratio) ** (1 / steps)
    left = _cost(before[-1], of, after=True) / _cost(before[0], of, after=False)
    target = (1 - ratio) ** ((done + 1) / steps)
    return min(max(1 - target / left, 1e-6), 1 - 1e-6)


def _cost(plan: PruningPlan, of: str, *, after: bool) -> int:
    if of == "channels":
        return sum(g.keep if after else g.channels for g in plan.groups)
    if of == "params":
        return plan.params_after if after else plan.params_before
    return plan.macs_after if after else plan.macs_before


def compose(plans: Sequence[PruningPlan], ratio: float) -> PruningPlan:
    """All cuts as one, in channels of the dense model.

    Args:
        plans: in order, at least one; each made for the model that the one before it leaves.
        ratio: that was asked for in all.

    Returns:
        A plan whose sensitivities are those of the dense model. A single plan comes back as it is.

    Raises:
        UsageError: no plans, or a plan that does not fit what the one before it leaves.
    """
    if not plans:
        raise UsageError("there is no cut to put together")
    if len(plans) == 1:
        return plans[0]
    first, last = plans[0], plans[-1]
    alive = {g.name: list(range(g.channels)) for g in first.groups}
    for plan in plans:
        for group in plan.groups:
            if len(alive.get(group.name, ())) != group.channels:
                raise UsageError(
                    f"group {group.name!r} has {group.channels} channels in a later cut, but "
                    f"{len(alive.get(group.name, ()))} were left by the one before it"
                )
            gone = set(group.removed)
            alive[group.name] = [c for position, c in enumerate(alive[group.name]) if position not in gone]
    groups = tuple(replace(g, removed=tuple(sorted(set(range(g.channels)) - set(alive[g.name])))) for g in first.groups)
    if first.of == "latency":  # measured against the dense model in every cut, so the last one's word holds
        reached, note = ratio, last.note
    else:
        reached, note = 1 - _cost(last, first.of, after=True) / _cost(first, first.of, after=False), ""
    if abs(reached - ratio) > TOLERANCE:
        note = f"asked to remove {ratio:.1%} of {first.of}, {len(plans)} cuts came to {reached:.1%}. {last.note}"
    return replace(
        first, ratio=ratio, groups=groups, macs_after=last.macs_after, params_after=last.params_after, note=note.strip()
    )
