"""Charts of robust accuracy by class and by radius."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from ..evaluation.card import ResultCard
from ..report import svg, text
from .charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from .layers import shortened
from .types import RunReport

STEP = 20.0
MOST_CLASSES = 20
COLOURS = ("base", "main")
"""Those of the first and the second model; a model alone has the second."""


@dataclass(frozen=True)
class ClassRow:
    """Robust accuracy of one or two models on the images of a class, in [0, 1]."""

    name: str
    shares: tuple[float, ...]


def class_rows(run: RunReport) -> tuple[list[ClassRow], int]:
    """Return the classes, and how many there are: the largest loss first, or with one model the lowest accuracy.

    Of more than 20 classes these are the ten at either end.
    """
    found = [{row.label: row for row in card.per_class if row.total} for _, card in _compared(run)]
    if not found:
        return [], 0
    rows = []
    for label in set.intersection(*(set(classes) for classes in found)):
        name = run.class_names[label] if 0 <= label < len(run.class_names) else str(label)
        rows.append(ClassRow(name, tuple(classes[label].robust / classes[label].total for classes in found)))
    rows.sort(key=lambda row: (row.shares[-1] - (row.shares[0] if len(row.shares) > 1 else 0.0), row.name))
    half = MOST_CLASSES // 2
    return (rows if len(rows) <= MOST_CLASSES else [*rows[:half], *rows[-half:]]), len(rows)


def _compared(run: RunReport) -> list[tuple[str, ResultCard]]:
    return [(model.label, model.card) for model in run.models[:2] if model.card is not None]


def by_class(run: RunReport) -> Markup:
    """Return a chart of the robust accuracy of the first two models on each class; empty if it was not measured."""
    rows, _ = class_rows(run)
    if not rows:
        return Markup("")
    labels = [label for label, _ in _compared(run)]
    colours = COLOURS[-len(labels) :]
    bottom, start = TOP + STEP * len(rows), LEFT + 90
    x = svg.axis([0.0, *(100 * share for row in rows for share in row.shares)], start, RIGHT)
    parts = []
    for tick in x.ticks:
        parts.append(svg.line(x(tick), TOP, x(tick), bottom, "grid"))
        parts.append(svg.label(x(tick), bottom + 16, f"{svg.number(tick)} %", "tick", "middle"))
    for place, (label, css) in enumerate(zip(labels, colours, strict=True)):
        parts.append(svg.dot(start + 5 + 130 * place, TOP - 18, 4, f"dot {css}"))
        parts.append(svg.label(start + 14 + 130 * place, TOP - 14, shortened(label), f"name {css}"))
    for position, row in enumerate(rows):
        y = TOP + STEP * (position + 0.5)
        places = [x(100 * share) for share in row.shares]
        tip = f"{row.name}: {' → '.join(map(text.percent, row.shares))}"
        parts.append(svg.label(start - 10, y + 4, shortened(row.name), "row", "end", tip))
        parts.append(svg.line(min(places), y, max(places), y, "stem"))
        parts += [svg.dot(place, y, 4, f"dot {css}", tip) for place, css in zip(places, colours, strict=True)]
    parts.append(svg.label(RIGHT, bottom + 34, "robust accuracy", "axis-title", "end"))
    return svg.figure(WIDTH, int(bottom) + 44, "Robust accuracy by class", parts)


def by_radius(run: RunReport) -> Markup:
    """Return a chart of accuracy under PGD at each radius of the sweep; empty unless two radii were measured."""
    compared = _compared(run)
    coloured = zip(COLOURS[-len(compared) :], compared, strict=True) if compared else ()
    judged = [(css, label, card, [at for at in card.sweep if at[1].total]) for css, (label, card) in coloured]
    swept = [one for one in judged if len(one[-1]) > 1]
    if not swept:
        return Markup("")
    pixels = swept[0][2].threat.norm == "linf"
    unit = 255.0 if pixels else 1.0
    radii = [unit * radius for *_, sweep in swept for radius, _ in sweep]
    shares = [100 * accuracy.value for *_, sweep in swept for _, accuracy in sweep]
    x, y = svg.axis([0.0, *radii], LEFT, RIGHT - 46), svg.axis([0.0, *shares], BOTTOM, TOP)
    norm = "Linf" if pixels else "L2"
    parts = svg.frame(x, y, f"radius, {norm}{' in 255ths' if pixels else ''}", "accuracy under PGD", " %")
    for position, (css, label, _, sweep) in enumerate(swept):
        places = [(x(unit * radius), y(100 * accuracy.value)) for radius, accuracy in sweep]
        parts.append(svg.polyline(places, f"curve {css}"))
        for (px, py), (radius, accuracy) in zip(places, sweep, strict=True):
            low, high = accuracy.interval
            parts.append(svg.line(px, y(100 * low), px, y(100 * high), f"bar {css}"))
            parts.append(svg.dot(px, py, 3, f"dot {css}", f"{label}, {unit * radius:.3g}: {accuracy}"))
        parts.append(svg.label(places[-1][0] + 8, places[-1][1] + (4 if position == 0 else 18), label, f"name {css}"))
    return svg.figure(WIDTH, HEIGHT, "Robust accuracy by radius of the attack", parts)
