"""Charts of the report: robust accuracy against latency, speed-ups and training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup

from ..evaluation.card import Accuracy
from ..report import svg, text
from ..training.types import EpochRecord, Start
from .table import find_latency, key_of, latency_keys, short_latency, shown_robust
from .types import RunReport

WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 44.0, 404.0, 34.0, 244.0
LETTER, LINE = 7.8, 13.0


@dataclass(frozen=True)
class Placed:
    """A model in the chart of the trade-off: its cost with bounds, and its robust accuracy."""

    name: str
    cost: float
    low: float
    high: float
    robust: Accuracy


def tradeoff(run: RunReport) -> Markup:
    """Return a chart of robust accuracy over median latency, with 95 % intervals; empty unless two models have both.

    Without latencies the cost is the number of MACs. A line connects two models or, with more models, the Pareto front;
    models that another one dominates are grey. The accuracy is that of the ONNX file if it was measured, else that of
    the torch model.
    """
    found, cost = _placed(run)
    if len(found) < 2:
        return Markup("")
    x = svg.axis([0.0, *(model.high for model in found)], LEFT, RIGHT)
    y = svg.axis([100 * bound for model in found for bound in model.robust.interval], BOTTOM, TOP)
    parts = svg.frame(x, y, cost, "robust accuracy", " %")
    places = [(x(model.cost), y(100 * model.robust.value)) for model in found]
    taken: list[tuple[float, float, float]] = []
    front = pareto([(model.cost, model.robust.value) for model in found]) if len(found) > 2 else [0, 1]
    parts += [svg.line(*places[a], *places[b], "link") for a, b in pairwise(front)]
    for position, model in enumerate(found):
        css = "base" if position == 0 else "main" if position in front else "faint"
        low, high = model.robust.interval
        px, py = places[position]
        parts.append(svg.line(x(model.low), py, x(model.high), py, f"bar {css}"))
        parts.append(svg.line(px, y(100 * low), px, y(100 * high), f"bar {css}"))
        dominated = ", dominated" if css == "faint" else ""
        parts.append(svg.dot(px, py, 5, f"dot {css}", f"{_tip(model, cost)}{dominated}"))
        width = LETTER * len(model.name)
        shift, anchor = (-10.0, "end") if px + 10 + width > RIGHT else (10.0, "start")
        # On the side away from the connecting line.
        drop = 18.0 if position and py > places[0][1] else -9.0
        left = px + shift - (width if anchor == "end" else 0)
        at = _free_height(left, left + width, py + drop, taken)
        taken.append((left, left + width, at))
        parts.append(svg.label(px + shift, at, model.name, f"name {css}", anchor))
    return svg.figure(WIDTH, HEIGHT, f"Robust accuracy against {'latency' if _MS in cost else 'MACs'}", parts)


_MS = "latency in ms"


def _placed(run: RunReport) -> tuple[list[Placed], str]:
    """Return the models with a cost and a robust accuracy, and the title of the cost's axis."""
    judged = [(model, robust) for model in run.models if (robust := shown_robust(model)) is not None and robust.total]
    keys = latency_keys(run)
    if not keys:
        macs = [
            Placed(model.label, model.macs / 1e6, model.macs / 1e6, model.macs / 1e6, robust)
            for model, robust in judged
        ]
        return macs, "millions of MACs"
    timed = [
        Placed(model.label, row.p50_ms, row.p50_low, row.p50_high, robust)
        for model, robust in judged
        if (row := find_latency(model, keys[0])) is not None
    ]
    return timed, f"median {_MS}, batch {keys[0][2]} (left is faster)"


def _tip(model: Placed, cost: str) -> str:
    unit = "ms" if _MS in cost else "M MACs"
    return f"{model.name}: {model.cost:.3g} {unit}, {text.percent(model.robust.value)}"


def _free_height(left: float, right: float, wanted: float, taken: Sequence[tuple[float, float, float]]) -> float:
    """Return the height nearest to `wanted` at which a label from `left` to `right` overlaps no other."""
    near = [height for a, b, height in taken if a < right and left < b]
    free = [h for h in (wanted + sign * LINE * k for k in range(len(near) + 2) for sign in (-1, 1)) if h > TOP / 2]
    clear = [h for h in free if all(abs(h - other) >= LINE for other in near)]
    return min(clear or [wanted], key=lambda height: abs(height - wanted))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the Pareto-optimal points (cost, value) in order of increasing cost."""
    front: list[int] = []
    for position in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[position][1] > points[front[-1]][1]:
            front.append(position)
    return front


def speedups(run: RunReport) -> Markup:
    """Return a chart of all speed-ups with 95 % intervals and a line at 1; empty without any."""
    rows = [(m.label, r, r.speedup) for m in run.models[1:] for r in m.latency if r.speedup is not None]
    if not rows:
        return Markup("")
    many = len(run.models) > 2
    keys = latency_keys(run)
    names = [", ".join([name] * many + [short_latency(key_of(row), keys)]) for name, row, _ in rows]
    step = 30.0
    bottom = TOP + step * len(rows) + 6
    start = min(max(LEFT + 66, LETTER * max(map(len, names)) + 14), RIGHT - 150)
    x = svg.axis([1.0, *(v for _, _, ratio in rows for v in (ratio.low, ratio.high))], start, RIGHT - 10)
    parts = [svg.label(LEFT - 30, TOP - 14, "speed-up", "axis-title")]
    for tick in x.ticks:
        parts.append(svg.line(x(tick), TOP, x(tick), bottom, "rule" if tick == 1 else "grid"))
        parts.append(svg.label(x(tick), bottom + 17, svg.number(tick) + text.TIMES, "tick", "middle"))
    for position, (label, (_, _, ratio)) in enumerate(zip(names, rows, strict=True)):
        y = TOP + step * (position + 0.5) + 3
        css = "base" if ratio.verdict == "no difference" else "main"
        parts.append(svg.label(x.start - 12, y + 4, label, "", "end"))
        parts.append(svg.line(x(ratio.low), y, x(ratio.high), y, f"bar {css}"))
        parts.append(svg.dot(x(ratio.value), y, 5, f"dot {css}", f"{label}: {text.speedup(ratio)}"))
        parts.append(svg.label(x(ratio.value), y - 9, f"{ratio.value:.2f}{text.TIMES}", f"name {css}", "middle"))
    parts.append(svg.label(x.end, bottom + 34, f"times as fast as {run.models[0].label}", "axis-title", "end"))
    return svg.figure(WIDTH, int(bottom) + 46, f"Speed-up over {run.models[0].label}", parts)


@dataclass(frozen=True)
class Series:
    """A curve: its name, its CSS class and its points (x, y)."""

    name: str
    css: str
    points: tuple[tuple[float, float], ...]


def _series(history: Sequence[EpochRecord], key: str, name: str, css: str, factor: float = 1.0) -> Series:
    points = [
        (float(record.epoch), factor * value)
        for record in history
        if (value := getattr(record, key)) is not None and math.isfinite(value)
    ]
    return Series(name, css, tuple(points))


def _curves(series: Sequence[Series], title: str, y_title: str, unit: str = "") -> Markup:
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    epochs = [p[0] for s in drawn for p in s.points]
    values = [p[1] for s in drawn for p in s.points]
    x = svg.axis([min(epochs), max(epochs)], LEFT, RIGHT - 46, integer=True)
    y = svg.axis([min(values), max(values)], BOTTOM, TOP)
    parts = svg.frame(x, y, "epoch", y_title, unit)
    ends = []
    for s in drawn:
        places = [(x(a), y(b)) for a, b in s.points]
        parts.append(svg.polyline(places, f"curve {s.css}"))
        if len(places) <= 30:
            parts += [
                svg.dot(px, py, 2.5, f"dot {s.css}", f"epoch {a:g}: {b:.3g}")
                for (px, py), (a, b) in zip(places, s.points, strict=True)
            ]
        ends.append((places[-1], s))
    for (px, _), s, py in _spread(ends):
        parts.append(svg.label(px + 8, py + 4, s.name, f"name {s.css}"))
    return svg.figure(WIDTH, HEIGHT, title, parts)


def _spread(
    ends: list[tuple[tuple[float, float], Series]], gap: float = 14.0
) -> list[tuple[tuple[float, float], Series, float]]:
    """Return the heights of the labels at the ends of curves, moved apart where they would overlap."""
    placed: list[tuple[tuple[float, float], Series, float]] = []
    last = -math.inf
    for place, series in sorted(ends, key=lambda end: end[0][1]):
        height = max(place[1], last + gap)
        placed.append((place, series, height))
        last = height
    return placed


def accuracy_curves(history: Sequence[EpochRecord], start: Start | None = None) -> Markup:
    """Return a chart of held-out accuracy by epoch, from epoch 0 where `start` is known; empty without epochs."""
    series = [
        _series(history, "val_clean", "clean", "base", 100),
        _series(history, "val_robust", "robust", "main", 100),
    ]
    if start is not None and history:
        first = {"clean": start.clean, "robust": start.robust}
        series = [replace(s, points=((0.0, 100 * first[s.name]), *s.points)) for s in series if s.points]
    return _curves(series, "Held-out accuracy by epoch", "held-out accuracy", " %")


def loss_curve(history: Sequence[EpochRecord]) -> Markup:
    """Return a chart of the training loss by epoch; empty without epochs."""
    return _curves([_series(history, "train_loss", "loss", "main")], "Training loss by epoch", "training loss")
