"""Pruning in several cuts: the ratio of each cut, and the composition of all cuts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import UsageError
from .rounding import TOLERANCE
from .types import PruningPlan


def remaining_ratio(before: Sequence[PruningPlan], ratio: float, metric: str, cuts: int) -> float:
    """Return the share of the *current* cost that the next cut removes, so that all cuts keep equal shares of it.

    Deviations of earlier cuts are compensated, so that the last cut meets the full budget.

    Args:
        before: plans of the previous cuts.
        ratio: share of the dense model's cost to remove in total, in (0, 1).
        metric: ``macs``, ``params`` or ``channels``.
        cuts: total number of cuts, more than `before` has.

    Returns:
        A share in (0, 1).

    Raises:
        UsageError: `cuts` is not above the number of previous cuts.
    """
    done = len(before)
    if not done < cuts:
        raise UsageError(f"a cut number {done + 1} was asked for, but only {cuts} are planned")
    if not before:
        return 1 - (1 - ratio) ** (1 / cuts)
    left = _cost(before[-1], metric, after=True) / _cost(before[0], metric, after=False)
    target = (1 - ratio) ** ((done + 1) / cuts)
    return min(max(1 - target / left, 1e-6), 1 - 1e-6)


def _cost(plan: PruningPlan, metric: str, *, after: bool) -> int:
    if metric == "channels":
        return sum(g.keep if after else g.channels for g in plan.groups)
    if metric == "params":
        return plan.params_after if after else plan.params_before
    return plan.macs_after if after else plan.macs_before


def realised(plan: PruningPlan, whole: Collection[str], macs: int, params: int) -> PruningPlan:
    """Return the plan as surgery carried it out: rolled-back groups keep all channels, and the costs are those reached.

    If the budget is missed because of that, the plan's note says so.

    Args:
        plan: the plan.
        whole: names of the groups that were rolled back.
        macs, params: MACs of one image and parameters of the pruned model.
    """
    if not whole:
        return plan
    groups = tuple(replace(g, removed=()) if g.name in whole else g for g in plan.groups)
    found = replace(plan, groups=groups, macs_after=macs, params_after=params)
    if plan.metric == "latency":  # the final measurement says by how much
        return found
    reached = 1 - _cost(found, plan.metric, after=True) / _cost(found, plan.metric, after=False)
    if abs(reached - plan.ratio) <= TOLERANCE:
        return found
    note = f"asked to remove {plan.ratio:.1%} of {plan.metric}; groups were rolled back, which leaves {reached:.1%}."
    return replace(found, note=f"{note} {plan.note}".strip())


def dense_widths(before: Sequence[PruningPlan]) -> dict[str, int]:
    """Return the channels that each group had in the first plan that contains it, by name."""
    return {g.name: g.channels for plan in reversed(before) for g in plan.groups}


def compose(plans: Sequence[PruningPlan], ratio: float) -> PruningPlan:
    """Return one plan for all cuts, in channels of the dense model.

    Args:
        plans: plans in order, at least one; each is made for the model that the previous cut leaves.
        ratio: requested share to remove in total, in (0, 1).

    Returns:
        A plan whose MRS is that of the dense model; a single plan is returned unchanged.

    Raises:
        UsageError: there is no plan, or a plan does not fit the model that the previous one leaves.
    """
    if not plans:
        raise UsageError("there is no cut to put together")
    if len(plans) == 1:
        return plans[0]
    first, last = plans[0], plans[-1]
    # A group is missing from a cut if it could not be proved there; it is unchanged by that cut.
    seen = {g.name: g for plan in reversed(plans) for g in plan.groups}
    alive = {name: list(range(g.channels)) for name, g in seen.items()}
    for plan in plans:
        for group in plan.groups:
            if len(alive[group.name]) != group.channels:
                raise UsageError(
                    f"group {group.name!r} has {group.channels} channels in a later cut, but "
                    f"{len(alive[group.name])} were left by the one before it"
                )
            removed = set(group.removed)
            alive[group.name] = [c for position, c in enumerate(alive[group.name]) if position not in removed]
    names = dict.fromkeys(g.name for plan in plans for g in plan.groups)
    groups = tuple(
        replace(seen[name], removed=tuple(sorted(set(range(seen[name].channels)) - set(alive[name])))) for name in names
    )
    if first.metric == "latency":  # every cut measures against the dense model, so the last note holds
        reached, note = ratio, last.note
    else:
        reached, note = 1 - _cost(last, first.metric, after=True) / _cost(first, first.metric, after=False), ""
    if abs(reached - ratio) > TOLERANCE:
        note = f"asked to remove {ratio:.1%} of {first.metric}, {len(plans)} cuts came to {reached:.1%}. {last.note}"
    return replace(
        first, ratio=ratio, groups=groups, macs_after=last.macs_after, params_after=last.params_after, note=note.strip()
    )
