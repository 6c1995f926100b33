"""Candidates of a latency budget, timed against the dense model."""

from __future__ import annotations

from robust_prune.bench.candidates import missed
from robust_prune.bench.types import LatencyRow, LatencyTable, Ratio
from robust_prune.recipe import BenchSection


def row(speedup: float, batch: int = 1) -> LatencyRow:
    ratio = Ratio(speedup, speedup, speedup, "faster")
    return LatencyRow("pruned", "m.onnx", "cpu", "host", batch, 1, 64, 1, 1, 1, None, None, None, 1, ratio, False)


def test_the_final_measurement_is_held_against_the_budget() -> None:
    bench = BenchSection(batches=(1, 32))
    table = LatencyTable((row(2.04), row(9.0, batch=32)), {}, {}, "")
    assert missed(table, bench, 0.5) == ""
    late = missed(LatencyTable((row(1.6),), {}, {}, ""), bench, 0.5)
    assert late == "the final file takes 62.5% of the dense latency (batch 1, 1 thread, cpu), 50.0% was asked for."
