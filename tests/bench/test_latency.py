"""Latency: real processes on tiny files."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from builders.bench_sample import classifier, left_over
from rich.console import Console

from robust_prune.bench import hardware, latency, sampler, session, statistics
from robust_prune.bench.latency import render_latency, run
from robust_prune.bench.sampler import Arm, Shape
from robust_prune.bench.types import LatencyRow, LatencyTable, Ratio
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.serialization import from_json, to_json

CPU1 = Shape(batch=1, threads=1, provider="cpu", kind="host")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "WARMUP_WINDOW_SECONDS", 0.002)
    monkeypatch.setattr(sampler, "VISIT_SECONDS", 0.001)


@pytest.mark.usefixtures("quick")
def test_a_table_has_a_row_for_each_file_and_batch_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('the user s file was imported')")
    before = left_over()
    files = [("dense", classifier(tmp_path / "dense.onnx")), ("pruned", classifier(tmp_path / "pruned.onnx", width=2))]
    table = run(files, batches=(1, 3), seconds_budget=0.05, seed=1)
    assert [(row.label, row.batch) for row in table.rows] == [("dense", 1), ("pruned", 1), ("dense", 3), ("pruned", 3)]
    assert set(table.noise_floor) == {"batch 1 x 1 thread", "batch 3 x 1 thread"}
    for row in table.rows:
        assert row.provider == "CPUExecutionProvider" and row.kind == "host" and row.samples >= 12
        assert 0 < row.p50_low <= row.p50_ms <= row.p50_high
        assert row.images_per_second == pytest.approx(1000 * row.batch / row.p50_ms)
        assert (row.speedup is None) == (row.label == "dense")
        for q, least in statistics.MIN_SAMPLES.items():
            assert (getattr(row, f"p{q}_ms") is None) == (row.samples < least)
    assert from_json(LatencyTable, json.loads(json.dumps(to_json(table)))) == table
    assert table.environment["cpu"] and "onnxruntime" in " ".join(table.environment["versions"])
    assert str(tmp_path) not in json.dumps(table.environment)
    assert left_over() == before


def test_the_printed_table_fits_80_columns_and_says_none_inside_the_noise_floor() -> None:
    def row(label: str, ms: float, samples: int, speedup: Ratio | None) -> LatencyRow:
        tails = [2 * ms if samples >= least else None for least in statistics.MIN_SAMPLES.values()]
        ends = (1000 / ms, speedup, True)
        return LatencyRow(label, "x", "CPUExecutionProvider", "host", 1, 1, samples, ms, ms, ms, *tails, *ends, 5, 96.4)

    rows = (
        row("dense", 12.0, 700, None),
        row("pruned", 0.5, 140, Ratio(1.6, 1.56, 1.62, "faster")),
        row("copy", 1234.0, 700, Ratio(1.0, 0.99, 1.01, "no difference")),
    )
    out = io.StringIO()
    Console(file=out, width=80).print(
        render_latency(LatencyTable(rows, {"batch 1 x 1 thread": (1.1, 1.0, 1.2)}, {}, ""))
    )
    shown = out.getvalue()
    for text in (
        "dense*",
        "1.60x [1.56, 1.62]",
        "none [0.99, 1.01]",
        "12.0 [12.0, 12.0]",
        "1,234",
        "p95 ms",
        "pruned 96 MiB",
    ):
        assert text in shown, shown
    assert "p99 ms" not in shown and "…" not in shown
    assert "CPU host time, 1 thread. Noise floor (A/A): batch 1 x 1 thread: 1.100 [1.000," in " ".join(shown.split())
    assert "* in doubt: the first file differs from itself" in shown


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"p90_ms": 3.1}, "every tenth run takes 1.6 times the median or more"),
        ({"noisy": True}, "the first file differs from itself"),
        ({"load_per_core": 3.5}, "the machine had 3.5 running processes for each core"),
    ],
)
def test_a_row_in_doubt_says_why(changes: dict[str, Any], reason: str) -> None:
    sound = LatencyRow(
        "dense", "x", "CPUExecutionProvider", "host", 1, 1, 700, 2.0, 1.9, 2.1, 2.9, 2.9, 3.0, 500, None, False,
        load_per_core=0.9,
    )  # fmt: skip
    assert sound.doubts == ()
    doubted = replace(sound, **changes)
    assert doubted.doubts == (reason,)
    out = io.StringIO()
    Console(file=out, width=80).print(render_latency(LatencyTable((doubted,), {}, {}, "")))
    assert "dense*" in out.getvalue() and reason in " ".join(out.getvalue().split())


def test_the_load_is_that_beside_the_measurement_not_that_of_what_ran_before() -> None:
    def facts(before: float | None, after: float | None) -> dict[str, Any]:
        return {"cores": 2, "load_1_minute": before, "after": {"load_1_minute": after}}

    assert hardware.load_per_core(facts(5.0, 1.0)) == 0.5
    assert hardware.load_per_core(facts(5.0, 7.0)) == 2.5
    assert hardware.load_per_core(facts(None, 7.0)) is None


@pytest.mark.usefixtures("quick")
def test_onnx_runtimes_defaults_are_a_row_of_their_own(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    table = run([("a", path)], threads=(1, 2), kinds=("host", "defaults"), seconds_budget=0.2)
    assert [(row.kind, row.threads) for row in table.rows] == [("host", 1), ("host", 2), ("defaults", 0)]
    assert "batch 1, ONNX Runtime's defaults" in table.noise_floor
    opened = session.open_session(path, "cpu", 0, 1)[0].get_session_options()
    assert opened.intra_op_num_threads == 0
    with pytest.raises(RuntimeError):
        opened.get_session_config_entry("session.intra_op.allow_spinning")


@pytest.mark.usefixtures("quick")
def test_a_worker_that_dies_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    before = left_over()
    path = classifier(tmp_path / "m.onnx")
    others = {p.pid for p in before}

    def kill_one(done: int, total: int) -> None:
        if done == 1:
            victim = next(p for p in psutil.Process().children() if p.pid not in others)
            os.kill(victim.pid, signal.SIGKILL)

    with pytest.raises(EnvironmentProblem, match=r"that timed (a|b) was ended by signal 9 \(out of memory\?"):
        sampler.measure([Arm("a", path), Arm("b", path)], CPU1, 0.05, 0, kill_one)
    assert left_over() == before


@pytest.mark.usefixtures("quick")
def test_a_file_that_breaks_while_it_runs_is_refused(tmp_path: Path) -> None:
    before = left_over()
    path = classifier(tmp_path / "m.onnx")
    # Opens, but its Flatten and MatMul disagree about the image size.
    wrong = onnx.load(path)
    wrong.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 7
    onnx.save(wrong, path)
    with pytest.raises(UsageError):
        run([("m", path)], seconds_budget=0.01)
    assert left_over() == before


def test_files_that_are_no_classifiers_are_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure", lambda *_: pytest.fail("timed"))
    good = classifier(tmp_path / "good.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("this is text")
    cases: list[tuple[str, Path, tuple[int, ...], str]] = [
        ("a", tmp_path / "none.onnx", (1,), "does not exist"),
        ("a", tmp_path, (1,), "is no file"),
        ("a", text, (1,), "not an ONNX file"),
        ("a", classifier(tmp_path / "two.onnx", inputs=2), (1,), "one floating-point batch.*x0.*x1"),
        ("a", classifier(tmp_path / "free.onnx", ["batch", 3, "h", 8]), (1,), "only the batch may be free"),
        ("a", classifier(tmp_path / "fixed.onnx", [2, 3, 8, 8]), (2, 8), "batch 8 was asked.*batches of 2 only"),
        ("a", good, (0,), "batch must be whole numbers >= 1"),
    ]
    for label, path, batches, message in cases:
        with pytest.raises(UsageError, match=message):
            run([(label, path)], batches=batches)
    for arguments, message in [
        ({"provider": "tpu"}, "unknown provider 'tpu'"),
        ({"kinds": ("host", "fast")}, "unknown kind of row 'fast'"),
        ({"kinds": ("graph",)}, "graph replay CUDA graphs, which the cpu provider does not have"),
        ({"energy": True}, "energy is read from.*the provider is cpu"),
        ({"threads": ()}, "threads must be"),
    ]:
        with pytest.raises(UsageError, match=message):
            run([("a", good)], **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="own label"):
        run([("a", good), ("a", good)])
    with pytest.raises(UsageError, match="no ONNX file"):
        run([])
