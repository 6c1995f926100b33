"""Latency budgets: candidates are pruned, exported and timed on this machine until one reaches the wanted latency.

Each candidate removes some share of the latency as layers timed alone predict it (`latency_cost`), or of the MACs where
there is no such prediction, planned as usual, and its file is timed against the dense model's in interleaved blocks.
The next share is interpolated between the candidates that were too slow and those that were fast enough.
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
        removed: share of the model's predicted latency, or of its MACs, that is removed, in [0, 1).
        kept: latency divided by that of the dense model, > 0.
    """

    removed: float
    kept: float


def next_share(tried: Sequence[Tried], wanted: float) -> float | None:
    """Return the share, in (0, 1), to remove in the next candidate, or None if the search ends.

    It ends within `AIM` of the wanted latency, after `MOST_CANDIDATES` candidates, if too little or too much has been
    removed already, or if the candidates on both sides are less than `NARROW` of the share apart.

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
        analysis: analysis of the model that is cut: the dense one, or the result of earlier cuts. If its costs contain
            ``latency``, shares are those of this prediction, else of the MACs.
        section: pruning section; its ratio is replaced by shares.
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
    metric = "latency" if "latency" in analysis.cost.forms else "macs"
    tried = [Tried(0.0, present)]
    plans: list[PruningPlan] = []
    while (share := next_share(tried, wanted)) is not None:
        plan = make_plan(analysis, section.model_copy(update={"metric": metric, "ratio": share}))
        if any(plan.groups == other.groups for other in plans):
            break
        plans.append(plan)
        kept = {group.name: group.keep for group in plan.groups}
        removed = 1 - analysis.cost.cost(kept, metric) / analysis.cost.cost({}, metric)
        tried.append(Tried(removed, measure(plan)))
        macs = 1 - plan.macs_after / plan.macs_before
        console.print(f"  {macs:.1%} of the MACs removed: {tried[-1].kept:.1%} of the latency", markup=False)
        if plan.note and tried[-1].kept > wanted:
            break  # the largest possible cut is too slow
    if not plans:  # an earlier cut is already fast enough, so this one is as small as possible
        plans.append(make_plan(analysis, section.model_copy(update={"metric": metric, "ratio": NARROW})))
        tried.append(tried[0])
    best, left = min(zip(plans, (t.kept for t in tried[1:]), strict=True), key=lambda pair: abs(pair[1] / wanted - 1))
    note = ""
    if abs(left / wanted - 1) > TOLERANCE:
        note = (
            f"asked for {wanted:.1%} of the dense latency ({conditions}), the nearest that was found is "
            f"{left:.1%}. {best.note}"
        ).strip()
    return replace(best, ratio=section.ratio, metric="latency", note=note)
