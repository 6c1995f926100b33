"""The headline table."""

from __future__ import annotations

import io
from dataclasses import replace

from builders.pages import Page
from builders.report_sample import latency, sample_run
from rich.console import Console

from robust_prune.bench.types import Ratio
from robust_prune.evaluation.card import Accuracy
from robust_prune.report import (
    RunReport,
    headline_markdown,
    headline_table,
    summary,
)
from robust_prune.report.html import render


def printed(run: RunReport, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(headline_table(run))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_table_fits_eighty_columns_and_pastes_as_markdown() -> None:
    shown = printed(sample_run(), 80)
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 9, "a line was wrapped"
    assert all(line.count("|") == 5 for line in lines)
    for figure in ("−50.0 %", "1.62× [1.58, 1.66]", "38.8 [34.6, 43.1]", "−1.8 points", "2.11 MB"):
        assert figure in shown
    assert "PGD-20" in shown and "Linf 8/255" in shown and "tier pgd" in shown


def test_many_models_stand_below_each_other() -> None:
    run = sample_run()
    rows = (latency("pruned int8", 1, 0.61, Ratio(5.11, 5.0, 5.2, "faster")),)
    third = replace(run.models[1], label="pruned int8", card=None, onnx_robust=Accuracy(180, 500), latency=rows)
    run = replace(run, models=(*run.models, third))
    lines = headline_markdown(run).splitlines()
    assert lines[0] == "| model | MACs | params | file | b1, ms | b32, ms | clean, % | robust, % |"
    assert lines[4].startswith("| pruned int8 | 80.05 M | 512 k | 2.11 MB | 0.610 (5.11× [5.00, 5.20]) | – | 72.2 [")
    assert "| 36.0 [31.9, 40.3] |" in lines[4]
    shown = [line for line in printed(run, 80).splitlines() if line.startswith("|")]
    assert len(shown) == 2 + 3, "a line was wrapped"
    assert all(figure in shown[-1] for figure in ("pruned int8", "0.610 5.11×", "36.0 [31.9, 40.3]"))
    page = Page(render(run))
    assert page is not None and "5.11 times as fast as the dense one" in " ".join(summary.summary(run))
    assert "The pruned model does 50" in summary.summary(run)[0]
    level = latency("half", 1, 3.1, Ratio(1.01, 0.99, 1.03, "no difference"))
    fourth = replace(run.models[1], label="half", latency=(level,))
    assert summary.summary(replace(run, models=(*run.models, fourth)))[-1] == (
        "The half file cannot be told apart in speed from the dense one at batch 1 and is right on 38.8 % of the "
        "images even when each one is attacked."
    )


def test_speed_inside_the_noise_floor_is_no_difference() -> None:
    run = sample_run()
    row = latency("pruned", 1, 3.1, Ratio(1.01, 0.99, 1.03, "no difference"))
    run = replace(run, models=(run.models[0], replace(run.models[1], latency=(row,))))
    assert "no difference, 1.01×" in headline_markdown(run)
    assert any("cannot be told apart" in sentence for sentence in summary.summary(run))
    assert [tile.value for tile in summary.tiles(run) if tile.name == "Speed"] == ["no difference"]
