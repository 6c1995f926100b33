"""The plan of a cut."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from ..shown import Shown
from ..structure.types import Skipped


@dataclass(frozen=True)
class PlannedGroup:
    """Which channels of a group go, and its MRS, where that was measured; `traced` and `members` as in ChannelGroup."""

    name: str
    channels: int
    removed: tuple[int, ...]
    mrs: float | None
    traced: bool = False
    members: tuple[str, ...] = ()

    @property
    def keep(self) -> int:
        """Channels that stay."""
        return self.channels - len(self.removed)


@dataclass(frozen=True, repr=False)
class PruningPlan(Shown):
    """The whole cut, before anything is touched.

    Attributes:
        ratio: share of `metric` to remove, in (0, 1).
        metric: ``macs``, ``params``, ``channels`` or ``latency``.
        allocation: how the budget was spread over the groups.
        criterion: score by which channels were chosen.
        round_to: of what widths are multiples where the budget allows.
        groups: all that can be cut, also those that stay whole.
        skipped: layers whose channels cannot be cut, and why.
        macs_before: multiply-accumulates for one image, in closed form over channel counts.
        macs_after: the same for the widths that stay.
        params_before: parameters, in closed form over channel counts.
        params_after: the same for the widths that stay.
        note: empty when the budget was met within 1 %, else which budget is nearest and why.
    """

    ratio: float
    metric: str
    allocation: str
    criterion: str
    round_to: int
    groups: tuple[PlannedGroup, ...]
    skipped: tuple[Skipped, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    note: str = ""

    def short(self) -> str:
        """What is removed, and what that leaves."""
        cut = sum(bool(group.removed) for group in self.groups)
        return (
            f"{self.ratio:.0%} of {self.metric}: {self.macs_after / self.macs_before:.1%} of the MACs and "
            f"{self.params_after / self.params_before:.1%} of the parameters stay; {cut} of {len(self.groups)} groups "
            "lose channels"
        )

    def table(self) -> Table:
        """Channels before and after, by group."""
        from .plan import render_plan

        return render_plan(self)
