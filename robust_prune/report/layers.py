"""Chart of the cut: sensitivity and channels of each group, one row a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..report import svg, text
from .types import RunReport

WIDTH = 500
NAME_END, MRS_START, MRS_END, BAR_START, BAR_END = 128.0, 144.0, 268.0, 292.0, 416.0
TOP, STEP = 38.0, 19.0
LONGEST_NAME = 20
MOST_DECADES = 5


@dataclass(frozen=True)
class GroupRow:
    """A group, or a layer where nothing was cut: MRS in nats and channels before and after; None where unknown."""

    name: str
    mrs: float | None
    before: int | None = None
    after: int | None = None

    @property
    def tip(self) -> str:
        """All figures of the row in words."""
        found = [self.name]
        if self.mrs is not None:
            found.append(f"MRS {self.mrs:.3g} nats")
        if self.before is not None and self.after is not None:
            share = text.percent(self.after / max(self.before, 1), 0)
            found.append(f"{self.after} of {self.before} channels kept ({share})")
        return ", ".join(found)


def group_rows(run: RunReport) -> list[GroupRow]:
    """Return a row for each group of the plan, or without a plan for each module of the profile."""
    if run.plan is None:
        return [GroupRow(m.name, m.mrs) for m in run.profile.modules] if run.profile else []
    return [GroupRow(group.name, group.mrs, group.channels, group.keep) for group in run.plan.groups]


def layers(run: RunReport) -> Markup:
    """Return a chart with a row for each group: MRS on a logarithmic scale, and channels kept; empty without either."""
    rows = group_rows(run)
    scale = log_scale([row.mrs for row in rows if row.mrs is not None])
    widest = max((row.before for row in rows if row.before), default=0)
    if not rows or (scale is None and not widest):
        return Markup("")
    names = text.short_names([row.name for row in rows])
    bottom = TOP + STEP * len(rows)
    parts = []
    if scale is not None:
        parts.append(svg.label(MRS_START, TOP - 20, "MRS in nats", "axis-title"))
        parts += _log_axis(scale, bottom)
    if widest:
        parts.append(svg.label(BAR_START, TOP - 20, "channels kept", "axis-title"))
    for position, row in enumerate(rows):
        y = TOP + STEP * (position + 0.5)
        parts.append(svg.label(NAME_END, y + 4, shortened(names[row.name]), "row", "end", row.tip))
        if scale is not None and row.mrs is not None and math.isfinite(row.mrs):
            x = scale.place(row.mrs)
            parts.append(svg.line(MRS_START, y, x, y, "stem"))
            parts.append(svg.dot(x, y, 4.5, "dot main", row.tip))
        if widest and row.before is not None and row.after is not None:
            unit = (BAR_END - BAR_START) / widest
            parts.append(svg.bar(BAR_START, y - 5, unit * row.before, 10, "removed", row.tip))
            parts.append(svg.bar(BAR_START, y - 5, unit * row.after, 10, "kept", row.tip))
            parts.append(svg.label(BAR_END + 10, y + 4, f"{row.after} of {row.before}", "tick"))
    return svg.figure(WIDTH, int(bottom) + 34, "Sensitivity and channels of each group", parts)


@dataclass(frozen=True)
class LogScale:
    """Powers of ten from `low` to `high` on the axis of MRS; smaller values, and zeros, stand at its start."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Return the pixel position of a value in nats."""
        share = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return MRS_START + min(1.0, max(0.0, share)) * (MRS_END - MRS_START)


def log_scale(values: Sequence[float]) -> LogScale | None:
    """Return a scale that covers the positive values, or their largest five decades; None without any."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return None
    # Smaller values are practically zero and would compress the others.
    high = math.ceil(math.log10(max(positive)) - 1e-9)
    low = max(math.floor(math.log10(min(positive)) + 1e-9), high - MOST_DECADES)
    return LogScale(min(low, high - 1), high)


def _log_axis(scale: LogScale, bottom: float) -> list[Markup]:
    parts = []
    for power in range(scale.low, scale.high + 1):
        x = scale.place(10.0**power)
        parts.append(svg.line(x, TOP, x, bottom, "grid"))
        parts.append(svg.label(x, bottom + 16, svg.number(10.0**power), "tick", "middle"))
    return parts


def shortened(name: str) -> str:
    """Return the end of a long name, which tells layers apart."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
