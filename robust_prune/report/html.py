"""The HTML report: one file without scripts that needs no network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from ..console import duration
from ..report import breakdown, charts, layers, pictures, summary, table, text
from .types import RunReport


def render(run: RunReport, examples: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the report as HTML; every value of the run is escaped.

    Args:
        run: the report.
        examples: images to show, as returned by `evaluation.examples.make_examples`.
    """
    template = _environment().from_string(files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    return template.render(**_context(run, examples))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "quantity": text.quantity,
        "file_size": text.file_size,
        "percent": text.percent,
        "duration": duration,
        "speedup": text.speedup,
        "span": text.span,
        "decimals": text.decimals,
        "threat": text.threat_name,
        "whole": whole_brackets,
    }
    return environment


def _context(run: RunReport, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # With several cuts, a group that the last one left whole may have lost channels to those before.
    cut = {group.name for group in run.plan.groups if group.removed} if run.plan else set()
    skipped = [*(run.plan.skipped if run.plan else ()), *(g for g in run.rolled_back if g.name not in cut)]
    return {
        "run": run,
        "title": unbroken(run.title),
        "created": text.moment(run.created),
        "lines": table.headline_lines(run),
        "pair": len(run.models) == table.SIDE_BY_SIDE,
        "wide_heads": table.wide_heads(run) if table.is_wide(run) else [],
        "wide_rows": table.wide_rows(run) if table.is_wide(run) else [],
        "tiles": summary.tiles(run),
        "summary": [unbroken(sentence) for sentence in summary.of_first_two(run)],
        "further": [unbroken(sentence) for sentence in summary.of_others(run)],
        "warnings": summary.warnings(run),
        "after_the_cut": unbroken(summary.after_the_cut(run)),
        "how_cut": summary.how_cut(run),
        "card": next((m.card for m in run.models if m.card), None),
        "tradeoff": charts.tradeoff(run),
        "speedups": charts.speedups(run),
        "layers": layers.layers(run),
        "skipped": skipped,
        "by_class": breakdown.by_class(run),
        "classes": breakdown.class_rows(run)[1],
        "by_radius": breakdown.by_radius(run),
        "accuracy_curves": charts.accuracy_curves(run.history, run.start),
        "loss_curve": charts.loss_curve(run.history),
        "latencies": [(m.label, row) for m in run.models for row in m.latency],
        "strips": pictures.strips(examples),
        "environment": flatten(run.environment),
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        "total_seconds": sum(run.seconds.values()),
    }


def unbroken(sentence: str) -> str:
    """Return the sentence with non-breaking spaces before per cent signs."""
    return sentence.replace(" %", "\u00a0%")


def whole_brackets(figures: str) -> str:
    """Return the text with non-breaking spaces inside brackets."""
    return re.sub(r"\[[^\]]*\]", lambda found: found.group().replace(" ", "\u00a0"), figures)


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as (name, value) lines without empty values."""
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(item, Mapping):
            lines += flatten(item, f"{name}: ")
        elif isinstance(item, list | tuple):
            lines.append((name, ", ".join(str(i) for i in item)))
        elif item is not None and item != "":
            lines.append((name, f"{item:.6g}" if isinstance(item, float) else str(item)))
    return [(name, shown) for name, shown in lines if shown]
