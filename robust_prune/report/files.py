"""Writes a report as JSON, CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench.types import LatencyRow
from ..evaluation.card import Accuracy
from ..runs.files import finite, json_text, write_texts
from ..serialization import to_json
from .html import render
from .summary import summary, warnings
from .table import headline_markdown
from .types import ModelRow, RunReport

NAMES = ("result.json", "result.csv", "result.md", "report.html")
"""Names of the files that `write` writes."""


def write(run: RunReport, folder: Path, examples: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write ``result.json``, ``result.csv``, ``result.md`` and ``report.html`` to `folder`: all of them, or none.

    Args:
        run: the report.
        folder: folder of the files, which is created if it does not exist.
        examples: images for the HTML page, as returned by `evaluation.examples.make_examples`.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    write_texts({
        folder / "result.json": json_text(finite(to_json(run))),
        folder / "result.csv": to_csv(run),
        folder / "result.md": to_markdown(run),
        folder / "report.html": render(run, examples),
    })  # fmt: skip


def to_csv(run: RunReport) -> str:
    """Return CSV with a line for each model and latency measurement; accuracies in [0, 1], times in milliseconds.

    A model without measurements has one line.
    """
    rows = [
        {**_model_columns(model), **_latency_columns(latency)}
        for model in run.models
        for latency in (model.latency or (None,))
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    """Return the value with an apostrophe before a text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t")) else value


def _model_columns(model: ModelRow) -> dict[str, Any]:
    card = model.card
    return {
        "model": model.label,
        "macs": model.macs,
        "params": model.params,
        "file_bytes": model.file_bytes,
        "data": card.data if card else None,
        "split": card.split if card else None,
        "tier": card.tier if card else None,
        "attack": card.attack if card else None,
        "norm": card.threat.norm if card else None,
        "epsilon": card.threat.epsilon if card else None,
        **_accuracy_columns("clean", card.clean if card else None),
        **_accuracy_columns("robust", card.robust if card else None),
        **_accuracy_columns("onnx_clean", model.onnx_clean),
        **_accuracy_columns("onnx_robust", model.onnx_robust),
        "flags": len(card.flags) if card else None,
    }


def _accuracy_columns(name: str, accuracy: Accuracy | None) -> dict[str, Any]:
    if accuracy is None or not accuracy.total:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_images": None}
    low, high = accuracy.interval
    return {name: accuracy.value, f"{name}_low": low, f"{name}_high": high, f"{name}_images": accuracy.total}


def _latency_columns(row: LatencyRow | None) -> dict[str, Any]:
    plain = ("provider", "kind", "batch", "threads", "samples", "p50_ms", "p50_low", "p50_high", "p90_ms", "p95_ms")
    names = (*plain, "p99_ms", "images_per_second")
    ratio = row.speedup if row else None
    return {
        **{name: getattr(row, name) if row else None for name in names},
        "speedup": ratio.value if ratio else None,
        "speedup_low": ratio.low if ratio else None,
        "speedup_high": ratio.high if ratio else None,
        "speedup_verdict": ratio.verdict if ratio else None,
    }


def to_markdown(run: RunReport) -> str:
    """Return title, summary, table, warnings, notes and command as Markdown."""
    parts = [f"# {run.title}", " ".join(summary(run)), headline_markdown(run).rstrip()]
    caution = warnings(run)
    if caution:
        parts.append("Warnings:\n\n" + "\n".join(f"- {sentence}" for sentence in caution))
    if run.notes:
        parts.append("Notes:\n\n" + "\n".join(f"- {note}" for note in run.notes))
    parts.append(f"To repeat it:\n\n```\n{run.command}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"
