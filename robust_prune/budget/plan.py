"""Planning of cuts: the channels to remove from each group, the cost before and after, and the plan as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..errors import UsageError
from ..ranking.importance import removal_order
from ..recipe import PruningSection
from ..structure.groups import GroupSearch
from ..structure.types import ChannelGroup
from .allocation import allocate
from .analysis import Analysis, check_groups
from .cost import CostModel
from .rounding import TOLERANCE, floor_of
from .types import PlannedGroup, PruningPlan

_BAR = 12


def make_plan(analysis: Analysis, section: PruningSection) -> PruningPlan:
    """Plan the removal of `section.ratio` of the model's cost; the channels with the lowest scores are removed.

    A budget that the structure does not allow (minimum widths, skipped groups) is no error: the plan is the nearest
    possible one, and its `note` names the ratio that it reaches.

    Args:
        analysis: analysis of the model.
        section: ratio, metric (for ``latency`` see `plan_for_latency`), allocation, rounding and minimum width. The
            criterion is that of `analysis`, which made the scores.

    Raises:
        UsageError: there is no group to cut, or an input that the allocation needs is missing from `analysis`.
    """
    search, cost, profile = analysis.search, analysis.cost, analysis.profile
    check_groups(search)
    keep = allocate(analysis, section, (1 - section.ratio) * cost.cost({}, section.metric))
    mrs = {} if profile is None else {group.name: group.mrs for group in profile.groups}
    planned = tuple(
        PlannedGroup(
            g.name, g.channels, _lowest(g, analysis.scores, keep[g.name]), mrs.get(g.name), g.traced, g.members
        )
        for g in search.groups
    )
    return PruningPlan(
        ratio=section.ratio,
        metric=section.metric,
        allocation=section.allocation,
        criterion=analysis.criterion or section.criterion,
        round_to=section.round_to,
        groups=planned,
        skipped=tuple(search.skipped),
        macs_before=cost.macs({}),
        macs_after=cost.macs(keep),
        params_before=cost.params({}),
        params_after=cost.params(keep),
        note=_note(search, cost, keep, section),
    )


def render_plan(plan: PruningPlan) -> Table:
    """Return a table with the channels of each group before and after, a bar and MRS, and totals in the footer."""
    title = f"Plan: remove {plan.ratio:.0%} of {plan.metric} ({plan.allocation} allocation, {plan.criterion} scores)"
    table = Table(title=title, caption=escape(plan.note) or None, show_footer=True)
    left = (plan.macs_after / plan.macs_before, plan.params_after / plan.params_before)
    # Layer names differ at their ends, so a narrow terminal must fold them and not truncate them.
    table.add_column("group", footer="MACs\nparameters", overflow="fold")
    table.add_column("channels", justify="right", footer=_totals(plan.macs_before, plan.params_before))
    table.add_column("kept", justify="right", footer=_totals(plan.macs_after, plan.params_after))
    table.add_column("kept, %", justify="right", footer="\n".join(f"{share:.0%}" for share in left))
    table.add_column("", footer="\n".join(_bar(share) for share in left), min_width=_BAR)
    table.add_column("MRS", justify="right")
    for group in plan.groups:
        share = group.keep / group.channels
        mrs = "" if group.mrs is None else f"{group.mrs:.3g}"
        table.add_row(group.name, str(group.channels), str(group.keep), f"{share:.0%}", _bar(share), mrs)
    for whole in plan.skipped:
        table.add_row(escape(f"{whole.name}: {whole.reason}"), "", "whole", "", "", "", style="dim")
    return table


def _lowest(group: ChannelGroup, scores: Mapping[str, Tensor], keep: int) -> tuple[int, ...]:
    if group.name not in scores:
        raise UsageError(f"the channel scores lack group {group.name!r}. Make them for the groups of this model.")
    order = removal_order(group, scores[group.name])
    return tuple(sorted(order[: group.channels - keep].tolist()))


def _note(search: GroupSearch, cost: CostModel, keep: Mapping[str, int], section: PruningSection) -> str:
    ratio, metric = section.ratio, section.metric
    reached = 1 - cost.cost(keep, metric) / cost.cost({}, metric)
    if abs(reached - ratio) <= TOLERANCE:
        return ""
    asked = f"asked to remove {ratio:.1%} of {metric}, the nearest"
    if all(keep[g.name] == floor_of(g, section.min_keep) for g in search.groups):
        whole = f" and {len(search.skipped)} groups stay whole" if search.skipped else ""
        lower = "min_keep or " if any(floor_of(g, 0) < keep[g.name] for g in search.groups) else ""
        said = f"{asked} that the structure allows is {reached:.1%}: every group is at its floor{whole}"
        return f"{said}. Lower {lower}the ratio."
    return f"{asked} found is {reached:.1%}: one channel more or less is too coarse a step."


def _totals(macs: int, params: int) -> str:
    return f"{macs / 1e6:,.2f} M\n{params / 1e6:,.3f} M"


def _bar(share: float) -> str:
    filled = round(share * _BAR)
    return "█" * filled + "░" * (_BAR - filled)
