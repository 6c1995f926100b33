"""Rows of a report: each model with its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..bench.types import LatencyTable
from ..evaluation.card import ResultCard
from ..exporters.types import OnnxArtifact
from .types import ModelRow

DENSE, PRUNED, SCRATCH, TRAINED = "dense", "pruned", "scratch", "trained"


def model_rows(label: str, card: ResultCard, files: Mapping[str, OnnxArtifact]) -> list[ModelRow]:
    """A row for the model with its fp32 file, and one for each file of lower precision."""
    assert card.macs is not None and card.params is not None
    return [
        ModelRow(
            label=label if precision == "fp32" else f"{label} {precision}",
            macs=card.macs,
            params=card.params,
            file_bytes=file.bytes,
            card=card if precision == "fp32" else None,
            onnx_clean=card.exported[precision].clean,
            onnx_robust=card.exported[precision].robust,
            onnx=file,
        )
        for precision, file in files.items()
    ]


def with_latency(rows: Sequence[ModelRow], table: LatencyTable) -> tuple[ModelRow, ...]:
    """Return the rows with the latency measurements of the same label."""
    return tuple(replace(row, latency=tuple(r for r in table.rows if r.label == row.label)) for row in rows)
