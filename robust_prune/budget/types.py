"""Pruning plans."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import RenderableType

from ..shown import Shown
from ..structure.types import Skipped


@dataclass(frozen=True)
class PlannedGroup:
    """Channels of a group that are removed.

    Attributes:
        name: name of the group.
        channels: channels before the cut.
        removed: channels to remove, ascending.
        mrs: MRS of the group in nats; None if it was not measured.
        traced, members: as in ChannelGroup.
    """

    name: str
    channels: int
    removed: tuple[int, ...]
    mrs: float | None
    traced: bool = False
    members: tuple[str, ...] = ()

    @property
    def keep(self) -> int:
        """Number of channels that are kept."""
        return self.channels - len(self.removed)


@dataclass(frozen=True, repr=False)
class PruningPlan(Shown):
    """Channels to remove from every group, and the cost before and after.

    Attributes:
        ratio: share of `metric` to remove, in (0, 1).
        metric: ``macs``, ``params``, ``channels`` or ``latency``.
        allocation: name of the allocation.
        criterion: name of the criterion whose scores select the channels.
        round_to: number of which widths are multiples where possible.
        groups: channels to remove from each group.
        skipped: groups and layers that cannot be cut, with the reasons.
        macs_before: multiply-accumulates of one image, computed from channel counts.
        macs_after: the same at the planned widths.
        params_before: number of parameters, computed from channel counts.
        params_after: the same at the planned widths.
        note: empty if the budget is met (within 1 % of the dense cost; of a latency, within 5 %), else the nearest
            ratio that is possible and why.
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
        """Return one sentence: the ratio, the remaining MACs and parameters, and the number of groups that are cut."""
        cut = sum(bool(group.removed) for group in self.groups)
        return (
            f"{self.ratio:.0%} of {self.metric}: {self.macs_after / self.macs_before:.1%} of the MACs and "
            f"{self.params_after / self.params_before:.1%} of the parameters stay; {cut} of {len(self.groups)} groups "
            "lose channels"
        )

    def table(self) -> RenderableType:
        """Return a table of the channels of each group before and after."""
        from .plan import render_plan

        return render_plan(self)
