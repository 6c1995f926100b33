"""Planning of cuts: the channels to remove from each group, the cost before and after, and the plan as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..console import FOLDED, FirstThatFits
from ..errors import UsageError
from ..ranking.importance import removal_order
from ..recipe import PruningSection
from ..structure.groups import GroupSearch
from ..structure.types import ChannelGroup
from .allocation import allocate
from .analysis import Analysis, check_groups
from .cost import CostModel
from .limits import limited
from .rounding import TOLERANCE, floor_of
from .types import PlannedGroup, PruningPlan

_BAR = 12
_OPTIONAL = ("", "kept, %", "MRS")
"""Headings of the columns that a narrow terminal goes without; that of the bar is empty."""


def make_plan(analysis: Analysis, section: PruningSection) -> PruningPlan:
    """Plan the removal of `section.ratio` of the model's cost; the channels with the lowest scores are removed.

    A budget that the structure does not allow (minimum widths, skipped groups) is no error: the plan is the nearest
    possible one, and its `note` names the ratio that it reaches.

    Args:
        analysis: analysis of the model.
        section: ratio, metric (for ``latency`` see `plan_for_latency`), allocation, rounding, minimum width and limits.
            The criterion is that of `analysis`, which made the scores.

    Raises:
        UsageError: there is no group to cut, a limit fits no layer, or an input that the allocation needs is missing
            from `analysis`.
    """
    check_groups(analysis.search)
    search, cost, profile = limited(analysis.search, section), analysis.cost, analysis.profile
    branches = {group.name: analysis.branches[group.name] for group in search.groups
                if group.name in analysis.branches and not group.least}  # fmt: skip
    analysis = replace(analysis, search=search, branches=branches)
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


def render_plan(plan: PruningPlan) -> FirstThatFits:
    """Return a table with the channels of each group before and after, a bar and MRS, and totals in the footer.

    Where it does not fit, the bar is left out, names are folded, and then the percentages and MRS are left out.
    """
    narrow = (_plan_table(plan, _OPTIONAL[:count], FOLDED) for count in (1, 2, 3))
    wide = (_plan_table(plan, _OPTIONAL[:count], None) for count in (0, 1))
    whole = (f"Whole: {group.name}: {group.reason}" for group in plan.skipped)
    return FirstThatFits(*wide, *narrow, below="\n".join(part for part in (plan.note, *whole) if part))


def _plan_table(plan: PruningPlan, left_out: Sequence[str], widest_name: int | None) -> Table:
    title = f"Plan: remove {plan.ratio:.0%} of {plan.metric} ({plan.allocation} allocation, {plan.criterion} scores)"
    table = Table(title=title, show_footer=True)
    left = (plan.macs_after / plan.macs_before, plan.params_after / plan.params_before)
    share = [group.keep / group.channels for group in plan.groups]
    # Layer names differ at their ends, so a narrow terminal must fold them and not truncate them.
    table.add_column("group", footer="MACs\nparameters", max_width=widest_name, overflow="fold")
    columns = {
        "channels": ([str(g.channels) for g in plan.groups], _totals(plan.macs_before, plan.params_before)),
        "kept": ([str(g.keep) for g in plan.groups], _totals(plan.macs_after, plan.params_after)),
        "kept, %": ([f"{s:.0%}" for s in share], "\n".join(f"{s:.0%}" for s in left)),
        "": ([_bar(s) for s in share], "\n".join(map(_bar, left))),
        "MRS": (["" if g.mrs is None else f"{g.mrs:.3g}" for g in plan.groups], ""),
    }
    shown = {heading: column for heading, column in columns.items() if heading not in left_out}
    for heading, (_, footer) in shown.items():
        table.add_column(heading, footer=footer, justify="right" if heading else "left", no_wrap=True)
    for index, group in enumerate(plan.groups):
        table.add_row(escape(group.name), *(cells[index] for cells, _ in shown.values()))
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
    if all(keep[g.name] in (0, floor_of(g, section.min_keep)) for g in search.groups):
        whole = f" and {len(search.skipped)} groups stay whole" if search.skipped else ""
        lower = "min_keep or " if any(floor_of(g, 0) < keep[g.name] for g in search.groups) else ""
        more = "Keep fewer layers, allow more in limits, or lower" if any(g.least for g in search.groups) else "Lower"
        said = f"{asked} that the structure allows is {reached:.1%}: every group is at its floor{whole}"
        return f"{said}. {more} {lower}the ratio."
    return f"{asked} found is {reached:.1%}: one channel more or less is too coarse a step."


def _totals(macs: int, params: int) -> str:
    return f"{macs / 1e6:,.2f} M\n{params / 1e6:,.3f} M"


def _bar(share: float) -> str:
    filled = round(share * _BAR)
    return "█" * filled + "░" * (_BAR - filled)
