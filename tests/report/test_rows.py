"""The rows of a report: each model with its files."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.report_sample import artifact, card, latency

from robust_prune.bench.types import LatencyTable
from robust_prune.evaluation.card import Accuracy, ExportedAccuracy
from robust_prune.report.rows import model_rows, with_latency
from robust_prune.report.types import ModelRow


@pytest.fixture
def rows() -> list[ModelRow]:
    exported = {
        "fp32": ExportedAccuracy(Accuracy(360, 500), Accuracy(190, 500)),
        "int8": ExportedAccuracy(Accuracy(350, 500), Accuracy(170, 500)),
    }
    found = replace(card("pruned", 361, 194), macs=80, params=50, exported=exported)
    return model_rows("pruned", found, {"fp32": artifact("model", 400), "int8": artifact("model.int8", 100)})


def test_a_model_has_a_row_and_so_has_each_of_its_lower_precisions(rows: list[ModelRow]) -> None:
    assert [(row.label, row.macs, row.params, row.file_bytes) for row in rows] == [
        ("pruned", 80, 50, 400), ("pruned int8", 80, 50, 100),
    ]  # fmt: skip
    assert [(row.onnx_clean, row.onnx_robust) for row in rows] == [
        (Accuracy(360, 500), Accuracy(190, 500)), (Accuracy(350, 500), Accuracy(170, 500)),
    ]  # fmt: skip
    # The torch model itself was judged once, beside its fp32 file.
    assert rows[0].card is not None and rows[0].card.robust.correct == 194 and rows[1].card is None
    assert [row.onnx.path for row in rows if row.onnx] == ["model.onnx", "model.int8.onnx"]
    assert all(row.latency == () for row in rows)


def test_each_row_gets_the_measurements_of_its_own_file(rows: list[ModelRow]) -> None:
    measured = (
        latency("pruned", 1, 2.0, None), latency("pruned int8", 1, 1.0, None), latency("pruned", 32, 60.0, None),
        latency("dense", 1, 3.0, None),
    )  # fmt: skip
    done = with_latency(rows, LatencyTable(measured, {}, {}, ""))
    assert [[(row.batch, row.p50_ms) for row in model.latency] for model in done] == [
        [(1, 2.0), (32, 60.0)],
        [(1, 1.0)],
    ]
    assert [replace(row, latency=()) for row in done] == rows
