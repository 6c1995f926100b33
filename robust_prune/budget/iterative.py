"""Cuts in several steps: how much each of them takes, and what they come to together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import UsageError
from .rounding import TOLERANCE
from .types import PruningPlan


def remaining_ratio(before: Sequence[PruningPlan], ratio: float, metric: str, steps: int) -> float:
    """Share of the *present* model that the next cut removes, so that equal shares remain after each of `steps` cuts.

    What earlier cuts took too much or too little is made good, and the last one lands on the whole budget.

    Args:
        before: the cuts so far.
        ratio: share of the dense model's cost to remove in all, in (0, 1).
        metric: ``macs``, ``params`` or ``channels``.
        steps: number of cuts, more than were made.

    Raises:
        UsageError: `steps` is not above the number of cuts made.
    """
    done = len(before)
    if not done < steps:
        raise UsageError(f"a cut number {done + 1} was asked for, but only {steps} are planned")
    if not before:
        return 1 - (1 - ratio) ** (1 / steps)
    left = _cost(before[-1], metric, after=True) / _cost(before[0], metric, after=False)
    target = (1 - ratio) ** ((done + 1) / steps)
    return min(max(1 - target / left, 1e-6), 1 - 1e-6)


def _cost(plan: PruningPlan, metric: str, *, after: bool) -> int:
    if metric == "channels":
        return sum(g.keep if after else g.channels for g in plan.groups)
    if metric == "params":
        return plan.params_after if after else plan.params_before
    return plan.macs_after if after else plan.macs_before


def realised(plan: PruningPlan, whole: Collection[str], macs: int, params: int) -> PruningPlan:
    """The plan as surgery carried it out.

    Args:
        plan: as it was made.
        whole: names of the groups that were rolled back.
        macs, params: of the model that came out.
    """
    if not whole:
        return plan
    groups = tuple(replace(g, removed=()) if g.name in whole else g for g in plan.groups)
    return replace(plan, groups=groups, macs_after=macs, params_after=params)


def dense_widths(before: Sequence[PruningPlan]) -> dict[str, int]:
    """Channels that each group had when it was first planned for, by name."""
    return {g.name: g.channels for plan in reversed(before) for g in plan.groups}


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
    # A group may be missing from a cut for which it could not be proven, and stays as it was.
    seen = {g.name: g for plan in reversed(plans) for g in plan.groups}
    alive = {name: list(range(g.channels)) for name, g in seen.items()}
    for plan in plans:
        for group in plan.groups:
            if len(alive[group.name]) != group.channels:
                raise UsageError(
                    f"group {group.name!r} has {group.channels} channels in a later cut, but "
                    f"{len(alive[group.name])} were left by the one before it"
                )
            gone = set(group.removed)
            alive[group.name] = [c for position, c in enumerate(alive[group.name]) if position not in gone]
    names = dict.fromkeys(g.name for plan in plans for g in plan.groups)
    groups = tuple(
        replace(seen[name], removed=tuple(sorted(set(range(seen[name].channels)) - set(alive[name])))) for name in names
    )
    if first.metric == "latency":  # measured against the dense model in every cut, so the last one's word holds
        reached, note = ratio, last.note
    else:
        reached, note = 1 - _cost(last, first.metric, after=True) / _cost(first, first.metric, after=False), ""
    if abs(reached - ratio) > TOLERANCE:
        note = f"asked to remove {ratio:.1%} of {first.metric}, {len(plans)} cuts came to {reached:.1%}. {last.note}"
    return replace(
        first, ratio=ratio, groups=groups, macs_after=last.macs_after, params_after=last.params_after, note=note.strip()
    )
