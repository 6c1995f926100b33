"""A budget in latency: cuts are made, exported and timed on this machine until one is as fast as was asked.

MACs say little about time on a given machine, so no model of latency stands in for the clock. A cut of some share of
the MACs is planned as usual and carried out, the file is timed against the dense model's in interleaved blocks, and the
next share follows from where the wanted latency lies between the cuts that were too slow and those that were not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..console import console
from ..recipe import PruningSection
from .analysis import Analysis
from .plan import make_plan
from .types import PruningPlan

TOLERANCE = 0.05
"""A latency within this share of the wanted one keeps the budget."""

AIM = 0.02
"""The search goes on until it is this close, so that the final measurement still keeps the budget."""

MOST_CANDIDATES = 8
MOST_REMOVED = 0.99
NARROW = 0.004


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Attributes:
        removed: share of the model's MACs that it removes, in [0, 1).
        kept: its latency over that of the dense model, > 0.
    """

    removed: float
    kept: float


def next_share(tried: Sequence[Tried], wanted: float) -> float | None:
    """The share of the MACs to remove next, or None where the search ends.

    It ends within `AIM` of the wanted latency, after `MOST_CANDIDATES`, or when the candidates on either side of it are
    so close to each other that the structure has nothing between them.

    Args:
        tried: at least one candidate, in the order in which they were measured.
        wanted: latency over that of the dense model, in (0, 1).
    """
    if min(abs(t.kept / wanted - 1) for t in tried) <= AIM or len(tried) > MOST_CANDIDATES:
        return None
    slow = max((t for t in tried if t.kept > wanted), key=lambda t: t.removed, default=None)
    fast = min((t for t in tried if t.kept <= wanted), key=lambda t: t.removed, default=None)
    if slow is None:
        return None
    if fast is None:
        if slow.removed >= MOST_REMOVED:
            return None
        return min(1 - (1 - slow.removed) * wanted / slow.kept, MOST_REMOVED)
    width = fast.removed - slow.removed
    if width < NARROW:
        return None
    share = (slow.kept - wanted) / (slow.kept - fast.kept)
    # A candidate next to one that is known narrows nothing, whatever the line through the two says.
    return slow.removed + width * min(max(share, 0.1), 0.9)


def plan_for_latency(
    analysis: Analysis,
    section: PruningSection,
    wanted: float,
    present: float,
    measure: Callable[[PruningPlan], float],
    conditions: str,
) -> PruningPlan:
    """The plan whose exported file comes nearest to `wanted` times the latency of the dense model.

    Args:
        analysis: of the model that is cut: the dense one, or what earlier cuts left of it.
        section: how a cut of some share of the MACs is planned.
        wanted: latency over that of the dense model, in (0, 1).
        present: the same of the model that is cut; 1 for the dense one.
        measure: carries a plan out and returns the outcome's latency over that of the dense model.
        conditions: that latency is measured under, for messages.

    Returns:
        The plan, with a note where no candidate came within `TOLERANCE`.

    Raises:
        UsageError: nothing can be cut.
    """
    console.print(f"Looking for {wanted:.0%} of the dense latency ({conditions})", markup=False)
    tried = [Tried(0.0, present)]
    plans: list[PruningPlan] = []
    while (share := next_share(tried, wanted)) is not None:
        plan = make_plan(analysis, section.model_copy(update={"metric": "macs", "ratio": share}))
        if any(plan.groups == other.groups for other in plans):
            break
        plans.append(plan)
        removed = 1 - plan.macs_after / plan.macs_before
        tried.append(Tried(removed, measure(plan)))
        console.print(f"  {removed:.1%} of the MACs removed: {tried[-1].kept:.1%} of the latency", markup=False)
        if plan.note and tried[-1].kept > wanted:
            break  # not even the most that can be cut is fast enough
    if not plans:  # an earlier cut is as fast as was asked already; the smallest step that there is
        plans.append(make_plan(analysis, section.model_copy(update={"metric": "macs", "ratio": NARROW})))
        tried.append(tried[0])
    best, kept = min(zip(plans, (t.kept for t in tried[1:]), strict=True), key=lambda pair: abs(pair[1] / wanted - 1))
    note = ""
    if abs(kept / wanted - 1) > TOLERANCE:
        note = (
            f"asked for {wanted:.1%} of the dense latency ({conditions}), the nearest that was found is "
            f"{kept:.1%}. {best.note}"
        ).strip()
    return replace(best, ratio=section.ratio, metric="latency", note=note)
