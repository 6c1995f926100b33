"""The plan of a cut: which channels of which group go, what that costs and saves, and how it looks as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..errors import UsageError
from ..ranking.importance import removal_order
from ..sensitivity.groups import MRS_EXPONENT, damped
from ..sensitivity.profile import SensitivityProfile
from ..structure.types import ChannelGroup, Refused
from .allocation import allocate
from .cost import CostModel
from .rounding import TOLERANCE, floor_of
from .types import PlannedGroup, PruningPlan

_BAR = 12


class GroupsFound(Protocol):
    """What `find_groups` returns: the groups that can be cut and those that cannot, with reasons."""

    @property
    def groups(self) -> Sequence[ChannelGroup]:
        """Groups that can be cut."""
        ...

    @property
    def refused(self) -> Sequence[Refused]:
        """Groups that stay whole."""
        ...


def check_groups(found: GroupsFound) -> None:
    """Raises UsageError if there is nothing to cut."""
    if not found.groups:
        reason = f": {found.refused[0].name}: {found.refused[0].reason}" if found.refused else ""
        raise UsageError(f"the model has no group of channels that can be cut{reason}")


def make_plan(
    found: GroupsFound,
    cost: CostModel,
    profile: SensitivityProfile | None,
    scores: Mapping[str, Tensor],
    removed_fraction: Mapping[str, Tensor] | None,
    *,
    ratio: float,
    of: str = "macs",
    allocation: str = "mrs",
    criterion: str,
    align: int = 8,
    min_keep: float = 0.1,
    exponent: float = MRS_EXPONENT,
) -> PruningPlan:
    """Plans the removal of `ratio` of the model's cost; the lowest-scored channels of each group go.

    A budget that the structure does not allow (floors, refused groups) is no error: the plan is the nearest that can be
    had and its `note` names the ratio it reaches, so that the caller can go on, warn or stop.

    Args:
        found: groups and refusals.
        cost: of the same groups.
        profile: group sensitivities; only ``uniform`` does without.
        scores: per group, [channels], higher is more important.
        removed_fraction: per group, [channels + 1]; only ``mrs`` needs it.
        ratio: share of `of` to remove, in (0, 1).
        of: ``macs``, ``params`` or ``channels``.
        allocation: one of `allocation.ALLOCATIONS`.
        criterion: what the scores are, for the record.
        align: widths are multiples of this where possible.
        min_keep: floor as a share of each group, in [0, 1).
        exponent: on MRS, for ``mrs`` allocation: see `damped`.

    Raises:
        UsageError: a value out of range, no group to cut, or an input that the allocation lacks.
    """
    if not 0 < ratio < 1:
        raise UsageError(f"ratio must be in (0, 1), got {ratio}. Try 0.5.")
    check_groups(found)
    before = cost.cost({}, of)
    keep = allocate(
        allocation,
        found.groups,
        cost,
        (1 - ratio) * before,
        of,
        damped(profile, found.groups, exponent) if profile and allocation == "mrs" else profile,
        scores,
        removed_fraction,
        align=align,
        min_keep=min_keep,
    )
    mrs = {} if profile is None else {s.name: s.mrs for s in profile.groups}
    planned = tuple(
        PlannedGroup(
            g.name, g.channels, _lowest(g, scores, keep[g.name]), mrs.get(g.name, math.nan), g.traced, g.members
        )
        for g in found.groups
    )
    return PruningPlan(
        ratio=ratio,
        of=of,
        allocation=allocation,
        criterion=criterion,
        align=align,
        groups=planned,
        refused=tuple(found.refused),
        macs_before=cost.macs({}),
        macs_after=cost.macs(keep),
        params_before=cost.params({}),
        params_after=cost.params(keep),
        note=_note(found, cost, keep, ratio, of, min_keep),
    )


def render_plan(plan: PruningPlan) -> Table:
    """The plan as a table: channels before and after with a bar and MRS a group, totals at the foot."""
    title = f"Plan: remove {plan.ratio:.0%} of {plan.of} ({plan.allocation} allocation, {plan.criterion} scores)"
    table = Table(title=title, caption=escape(plan.note) or None, show_footer=True)
    left = (plan.macs_after / plan.macs_before, plan.params_after / plan.params_before)
    # Layer names differ at their ends, so a narrow terminal must fold them rather than cut them off.
    table.add_column("group", footer="MACs\nparameters", overflow="fold")
    table.add_column("channels", justify="right", footer=_totals(plan.macs_before, plan.params_before))
    table.add_column("kept", justify="right", footer=_totals(plan.macs_after, plan.params_after))
    table.add_column("share", justify="right", footer="\n".join(f"{share:.0%}" for share in left))
    table.add_column("", footer="\n".join(_bar(share) for share in left), min_width=_BAR)
    table.add_column("MRS", justify="right")
    for group in plan.groups:
        share = group.keep / group.channels
        mrs = "" if math.isnan(group.mrs) else f"{group.mrs:.3g}"
        table.add_row(group.name, str(group.channels), str(group.keep), f"{share:.0%}", _bar(share), mrs)
    for refused in plan.refused:
        table.add_row(escape(f"{refused.name}: {refused.reason}"), "", "whole", "", "", "", style="dim")
    return table


def _lowest(group: ChannelGroup, scores: Mapping[str, Tensor], keep: int) -> tuple[int, ...]:
    if group.name not in scores:
        raise UsageError(f"the channel scores lack group {group.name!r}. Make them for the groups of this model.")
    order = removal_order(group, scores[group.name])
    return tuple(sorted(order[: group.channels - keep].tolist()))


def _note(found: GroupsFound, cost: CostModel, keep: Mapping[str, int], ratio: float, of: str, min_keep: float) -> str:
    before, after = cost.cost({}, of), cost.cost(keep, of)
    reached = 1 - after / before
    if abs(reached - ratio) <= TOLERANCE:
        return ""
    asked = f"asked to remove {ratio:.1%} of {of}, the nearest"
    if all(keep[g.name] == floor_of(g, min_keep) for g in found.groups):
        whole = f" and {len(found.refused)} groups stay whole" if found.refused else ""
        lower = "min_keep or " if any(floor_of(g, 0) < keep[g.name] for g in found.groups) else ""
        said = f"{asked} that the structure allows is {reached:.1%}: every group is at its floor{whole}"
        return f"{said}. Lower {lower}the ratio."
    return f"{asked} found is {reached:.1%}: one channel more or less is too coarse a step."


def _totals(macs: int, params: int) -> str:
    return f"{macs / 1e6:,.2f} M\n{params / 1e6:,.3f} M"


def _bar(share: float) -> str:
    filled = round(share * _BAR)
    return "█" * filled + "░" * (_BAR - filled)
