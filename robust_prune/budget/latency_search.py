"""Latency budgets: candidates are pruned, exported and timed on this machine until one reaches the wanted latency.

MACs predict latency on a given machine poorly, so latency is measured and not modelled. Each candidate removes some
share of the MACs, planned as usual, and its file is timed against the dense model's in interleaved blocks. The next
share is interpolated between the candidates that were too slow and those that were fast enough.
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
"""Largest relative deviation from the wanted latency that meets the budget."""

AIM = 0.02
"""Relative deviation at which the search stops; the final measurement then still meets the budget."""

MOST_CANDIDATES = 8
MOST_REMOVED = 0.99
NARROW = 0.004


@dataclass(frozen=True)
class Tried:
    """A measured candidate.

    Attributes:
        removed: share of the model's MACs that is removed, in [0, 1).
        kept: latency divided by that of the dense model, > 0.
    """

    removed: float
    kept: float


def next_share(tried: Sequence[Tried], wanted: float) -> float | None:
    """Return the share of the MACs, in (0, 1), to remove in the next candidate, or None if the search ends.

    It ends within `AIM` of the wanted latency, after `MOST_CANDIDATES` candidates, if too little or too much has been
    removed already, or if the candidates on both sides are less than `NARROW` of the MACs apart.

    Args:
        tried: the unpruned model and the candidates, in the order of measurement.
        wanted: wanted latency divided by that of the dense model, in (0, 1).
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
    # A candidate close to a known one would hardly narrow the interval, so keep a tenth of it on either side.
    return slow.removed + width * min(max(share, 0.1), 0.9)


def plan_for_latency(
    analysis: Analysis,
    section: PruningSection,
    wanted: float,
    present: float,
    measure: Callable[[PruningPlan], float],
    conditions: str,
) -> PruningPlan:
    """Return the plan whose exported file comes nearest to `wanted` times the latency of the dense model.

    Args:
        analysis: analysis of the model that is cut: the dense one, or the result of earlier cuts.
        section: pruning section; its ratio is replaced by shares of the MACs.
        wanted: wanted latency divided by that of the dense model, in (0, 1).
        present: latency of the model that is cut divided by that of the dense model; 1 for the dense model.
        measure: carries out a plan and returns the latency of the result divided by that of the dense model.
        conditions: conditions of the measurement, for messages.

    Returns:
        The plan; its note names the nearest latency if no candidate came within `TOLERANCE`.

    Raises:
        UsageError: the model has no group that can be cut.
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
            break  # the largest possible cut is too slow
    if not plans:  # an earlier cut is already fast enough, so this one is as small as possible
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
