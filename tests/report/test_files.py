"""JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from builders.report_sample import epoch, sample_examples, sample_run

from robust_prune.report import (
    ModelRow,
    RunReport,
    headline_markdown,
    write,
)
from robust_prune.report.files import to_csv, to_markdown
from robust_prune.serialization import from_json, to_json


def test_json_round_trip_is_lossless() -> None:
    run = sample_run()
    assert from_json(RunReport, json.loads(json.dumps(to_json(run)))) == run
    bare = RunReport("t", "c", {}, (), (ModelRow("dense", 1, 2),))
    assert from_json(RunReport, json.loads(json.dumps(to_json(bare)))) == bare


def test_write_leaves_four_whole_files(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    write(sample_run(), folder, sample_examples())
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "result.csv", "result.json", "result.md"]
    stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert from_json(RunReport, stored) == sample_run()
    assert stored["models"][1]["card"]["robust"]["value"] == pytest.approx(194 / 500)


def test_result_json_is_strict_json_even_with_nan(tmp_path: Path) -> None:
    history = (epoch(1, math.nan, 0.5, math.inf),)
    write(sample_run(history=history), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored["history"][0]["train_loss"] is None
    assert "val_clean" in stored["history"][0]


def test_csv_has_a_line_for_each_measurement() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(sample_run()))))
    assert [(r["model"], r["batch"]) for r in rows] == [
        ("dense", "1"), ("dense", "32"), ("pruned", "1"), ("pruned", "32"),
    ]  # fmt: skip
    assert float(rows[2]["speedup"]) == 1.62 and rows[0]["speedup"] == ""
    assert float(rows[2]["robust"]) == pytest.approx(0.388)
    assert float(rows[2]["robust_low"]) < 0.388 < float(rows[2]["robust_high"])
    without = list(csv.DictReader(io.StringIO(to_csv(sample_run(models=(ModelRow("only, one", 5, 6),))))))
    assert [r["model"] for r in without] == ["only, one"]


def test_markdown_holds_the_same_figures() -> None:
    run = sample_run()
    page = to_markdown(run)
    assert headline_markdown(run) in page + "\n"
    assert "| Robust acc., % | 40.6 [36.4, 45.0] | 38.8 [34.6, 43.1] | −1.8 points |" in page
    assert run.command in page and run.notes[0] in page
