"""Plot of `compression.py`: latency against robust accuracy, a panel for each network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from compression_table import network_of, right
from markupsafe import Markup, escape
from recovered import interval

from robust_prune.report import svg

WIDTH, HEIGHT, LEGEND = 460, 330, 36
LEFT, RIGHT, TOP, BOTTOM = 48.0, 440.0, 54.0, 284.0
COLOURS = ("#0b6e8a", "#c2571a", "#6a51a3", "#3f7f3f", "#b23a64", "#8a7a22", "#555555")
STYLE = (
    "text{font:12px sans-serif;fill:#1d2730}.tick{font-size:11px;fill:#66727c}.axis-title{font-size:11px;fill:#66727c}"
    ".title{font-weight:600;font-size:13px}.grid{stroke:#e3e7ea}.rule{stroke:#aab4bc}"
)


@dataclass(frozen=True)
class Point:
    """An arm at a ratio and budget; latencies in ms, accuracies in percent, each as value, low and high."""

    arm: str
    ratio: float
    minutes: float
    latency: tuple[float, float, float]
    robust: tuple[float, float, float]

    def tip(self) -> str:
        """Return the point in words."""
        return (
            f"{self.arm}, {100 * self.ratio:g} % of the MACs removed, {self.minutes:g} min: {self.latency[0]:.3g} ms, "
            f"{self.robust[0]:.1f} %"
        )


def points_of(stored: Mapping[str, Any]) -> list[Point]:
    """Return the points of a network whose latency was measured with batches of one image and one thread."""
    timed = {
        (ratio, row["label"]): (row["p50_ms"], row["p50_low"], row["p50_high"])
        for ratio, table in stored.get("latency", {}).items()
        for row in table["rows"]
        if (row["kind"], row["batch"]) == ("host", 1)
    }
    cells = dict.fromkeys((row["ratio"], row["minutes"], row["arm"]) for row in stored["rows"])
    found = []
    for ratio, minutes, arm in cells:
        latency = timed.get((f"{ratio:g}", network_of(arm)))
        if latency is None:
            continue
        mine = [row for row in stored["rows"] if (row["ratio"], row["minutes"], row["arm"]) == (ratio, minutes, arm)]
        values = 100 * np.stack([right(row, "aa_fast") for row in mine])
        low, high = interval(values)
        found.append(Point(arm, ratio, minutes, latency, (float(values.mean()), low, high)))
    return found


def plot(bases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the SVG text, or an empty text if no network has latencies.

    Args:
        bases: stored results by the name of the network.
    """
    panels = {name: found for name, stored in bases.items() if (found := points_of(stored))}
    if not panels:
        return ""
    arms = list(dict.fromkeys(point.arm for found in panels.values() for point in found))
    colour = dict(zip(arms, COLOURS, strict=False))
    columns = min(2, len(panels))
    lines = -(-len(arms) // (2 * columns))
    width, height = WIDTH * columns, HEIGHT * -(-len(panels) // columns) + LEGEND + 18 * lines
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Latency against robust accuracy"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for position, (name, found) in enumerate(panels.items()):
        x, y = WIDTH * (position % columns), HEIGHT * (position // columns)
        text.append(f'<g transform="translate({x} {y})">{_panel(name, found, colour)}</g>')
    text += _legend(colour, columns, height - LEGEND - 18 * lines + 18)
    return "\n".join([*text, "</svg>\n"])


def _panel(name: str, found: list[Point], colour: Mapping[str, str]) -> Markup:
    x = svg.axis([0.0, *(point.latency[2] for point in found)], LEFT, RIGHT)
    y = svg.axis([bound for point in found for bound in point.robust], BOTTOM, TOP)
    parts = [svg.label(LEFT - 30, 18, name, "title")]
    parts += svg.frame(x, y, "median latency in ms, one image, one thread", "accuracy under aa-fast in %")
    longest = max(point.minutes for point in found)
    for point in found:
        px, py, paint = x(point.latency[0]), y(point.robust[0]), colour[point.arm]
        bars = ((x(point.latency[1]), py, x(point.latency[2]), py), (px, y(point.robust[1]), px, y(point.robust[2])))
        for bar in bars:
            parts.append(
                Markup(
                    '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}" stroke-opacity=".4"/>'
                ).format(*bar, paint)
            )
        parts.append(_mark(px, py, point.minutes == longest, paint, point.tip()))
    return Markup("").join(parts)


def _mark(x: float, y: float, filled: bool, paint: str, tip: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(tip) if tip else Markup("")
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4.5" stroke="{}" fill="{}">{}</circle>').format(
        x, y, paint, paint if filled else "#fff", title
    )


def _legend(colour: Mapping[str, str], columns: int, top: float) -> list[str]:
    text = []
    for position, (arm, paint) in enumerate(colour.items()):
        x, y = 24 + 230 * (position % (2 * columns)), top + 18 * (position // (2 * columns))
        text.append(f'{_mark(x, y - 4, True, paint)}<text x="{x + 10}" y="{y}">{escape(arm)}</text>')
    below = top + 18 * -(-len(colour) // (2 * columns)) + 4
    return [
        *text,
        f'<text x="18" y="{below}" class="tick">Filled: the longest fine-tuning; bars: 95 % intervals.</text>',
    ]
