"""Elements of charts as inline SVG; colours are CSS variables of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Axis:
    """A linear map from data in [low, high] to pixels from `start` to `end`, with tick values."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Return the pixel position of a data value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5, integer: bool = False) -> tuple[float, ...]:
    """Return tick values that cover [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-7 * max(abs(low), abs(high), 1.0):
        high = low + (abs(low) if abs(low) > 1e-6 else 1.0)
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if integer:
        step = max(1.0, math.ceil(step))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return tuple(round(i * step, 10) for i in range(first, last + 1))


def axis(values: Sequence[float], start: float, end: float, *, count: int = 5, integer: bool = False) -> Axis:
    """Return an axis that covers all `values` and whose ends are ticks."""
    ticks = nice_ticks(min(values), max(values), count, integer)
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def number(value: float) -> str:
    """Return a tick label without trailing zeros."""
    return f"{value:.10g}"


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """Return a straight line."""
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, css)


def label(x: float, y: float, content: str, css: str = "", anchor: str = "start", title: str = "") -> Markup:
    """Return a text element, with a tooltip if `title` is given; both are escaped."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}{}</text>').format(
        x, y, anchor, css, escape(content), _tip(title)
    )


def bar(x: float, y: float, width: float, height: float, css: str, title: str = "") -> Markup:
    """Return a rectangle, with a tooltip if `title` is given."""
    return Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}">{}</rect>').format(
        x, y, width, height, css, _tip(title)
    )


def _tip(title: str) -> Markup:
    return Markup("<title>{}</title>").format(title) if title else Markup("")


def dot(x: float, y: float, radius: float, css: str, title: str = "") -> Markup:
    """Return a disc, with a tooltip if `title` is given."""
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}">{}</circle>').format(
        x, y, radius, css, _tip(title)
    )


def polyline(points: Sequence[tuple[float, float]], css: str) -> Markup:
    """Return a line through all points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline points="{}" class="{}"/>').format(path, css)


def figure(width: int, height: int, title: str, parts: Sequence[Markup]) -> Markup:
    """Return the chart; it scales with its container, and `title` is its accessible name."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, Markup("").join(parts)
    )


STYLE = """
text { font-family: Helvetica, Arial, sans-serif; font-size: 12px; fill: #16191d; }
.tick, .row { font-size: 11px; } .tick { fill: #5b6470; } .row { fill: #16191d; }
.axis-title { font-size: 11.5px; fill: #5b6470; }
.name { font-weight: bold; }
.grid { stroke: #eceff1; } .rule { stroke: #dfe3e7; } .stem { stroke: #cfdffa; stroke-width: 2; }
.link { stroke: #6d7683; stroke-dasharray: 2 4; }
.bar { stroke-width: 2; } .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.bar.main, .curve.main { stroke: #1d5fd1; } .bar.base, .curve.base { stroke: #6d7683; } .bar.faint { stroke: #dfe3e7; }
.dot.main, .name.main, .kept { fill: #1d5fd1; } .dot.base, .name.base { fill: #6d7683; }
.dot.faint { fill: #dfe3e7; } .name.faint { fill: #5b6470; } .removed { fill: #cfdffa; }
"""
"""Looks of a drawing outside the page: those of the page in its light colours."""


def standalone(drawing: Markup) -> str:
    """Return a chart, as returned by `figure`, as an SVG document of its own, with its looks and its size in pixels."""
    width, height = str(drawing).split('"', 2)[1].split()[2:]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return f"{str(drawing).replace('<svg', head, 1).replace('>', f'><style>{STYLE}</style>', 1)}\n"


def frame(x: Axis, y: Axis, x_title: str, y_title: str, unit: str = "") -> list[Markup]:
    """Return horizontal grid lines, tick labels and titles of the axes."""
    parts = [label(x.start - 30, y.end - 14, y_title, "axis-title")]
    for tick in y.ticks:
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(label(x.start - 6, y(tick) + 4, number(tick) + unit, "tick", "end"))
    for tick in x.ticks:
        parts.append(line(x(tick), y.start, x(tick), y.start + 4, "rule"))
        parts.append(label(x(tick), y.start + 17, number(tick), "tick", "middle"))
    parts.append(line(x.start, y.start, x.end, y.start, "rule"))
    parts.append(label(x.end, y.start + 34, x_title, "axis-title", "end"))
    return parts
