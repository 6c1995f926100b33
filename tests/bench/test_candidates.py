"""Candidates of a latency budget, timed against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.training_sample import make_images, make_model
from torch import nn

from robust_prune.bench import candidates
from robust_prune.bench.candidates import CandidateClock, conditions, missed
from robust_prune.bench.types import LatencyRow, LatencyTable, Ratio
from robust_prune.models import registry
from robust_prune.recipe import BenchSection
from robust_prune.recipe_reader import load


def row(speedup: float, batch: int = 1, threads: int = 1, label: str = "pruned") -> LatencyRow:
    ratio = Ratio(speedup, speedup, speedup, "faster")
    return LatencyRow(label, "m.onnx", "cpu", "host", batch, threads, 64, 1, 1, 1, None, None, None, 1, ratio, False)


def test_a_candidate_is_timed_beside_the_dense_model_under_the_first_conditions_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[tuple[Any, ...]] = []
    timed: list[tuple[Any, ...]] = []

    def export(model: nn.Module, spec: Any, images: Any, path: Path, section: Any, seed: int) -> None:
        path.write_bytes(b"onnx")
        exported.append((model, spec, images, path, section, seed))

    def run(files: Any, section: BenchSection, seed: int) -> LatencyTable:
        assert all(path.exists() for _, path in files)
        timed.append((files, section, seed))
        return LatencyTable((row(1.0, label="dense"), row(2.5)), {}, {}, "")

    monkeypatch.setattr(candidates, "export_model", export)
    monkeypatch.setattr(candidates, "run_section", run)
    recipe = load(
        None,
        {"bench.batches": [4, 32], "bench.threads": [2, 1], "bench.kinds": ["device", "host"], "bench.seconds": 8.0,
         "bench.provider": "cuda", "export.opset": 20, "seed": 7},
    )  # fmt: skip
    dense, small, images = make_model(0), make_model(1), make_images(20)
    spec = registry.make_spec("cifar/resnet20", num_classes=3, input_size=(3, 8, 8), mean=(0,) * 3, std=(1,) * 3)
    with CandidateClock.open(dense, spec, images, recipe) as clock:
        assert clock.kept(small) == pytest.approx(1 / 2.5)
        assert clock.kept(small) == pytest.approx(1 / 2.5)
    assert [(model, path.name) for model, _, _, path, _, _ in exported] == [
        (dense, "dense.onnx"), (small, "candidate.onnx"), (small, "candidate.onnx"),
    ]  # fmt: skip
    assert all(given[1:3] == (spec, images) and given[4:] == (recipe.export, 7) for given in exported)
    files, section, seed = timed[0]
    assert [(label, path.name) for label, path in files] == [("dense", "dense.onnx"), ("candidate", "candidate.onnx")]
    assert (section.batches, section.threads, section.kinds, section.provider) == ((4,), (2,), ("device",), "cuda")
    assert section.seconds == pytest.approx(4.0) and seed == 7
    assert not clock.folder.exists()
    assert conditions(recipe.bench) == "batch 4, 2 threads, cuda"


def test_the_final_measurement_is_held_against_the_budget() -> None:
    bench = BenchSection(batches=(1, 32), threads=(1, 2))

    def said(*rows: LatencyRow) -> str:
        return missed(LatencyTable(rows, {}, {}, ""), bench, 0.5)

    others = (row(9.0, batch=32), row(9.0, threads=2), row(9.0, label="pruned int8"), row(1.0, label="dense"))
    assert said(*others, row(2.04)) == ""
    late = said(*others, row(1.6))
    assert late == "the final file takes 62.5% of the dense latency (batch 1, 1 thread, cpu), 50.0% was asked for."
    assert "takes 40.0% of the dense latency" in said(row(2.5)), "more was cut than was asked for"
