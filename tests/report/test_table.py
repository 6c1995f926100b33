"""The headline table."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from builders.pages import Page
from builders.report_sample import latency, sample_run
from rich.console import Console

from robust_prune.bench.types import Ratio
from robust_prune.evaluation.card import Accuracy
from robust_prune.report import (
    ModelRow,
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
    assert "| 36.0 [31.9, 40.3] (−4.6 points) |" in lines[4]
    shown = [line for line in printed(run, 80).splitlines() if line.startswith("|")]
    assert len(shown) == 2 + 3, "a line was wrapped"
    assert all(figure in shown[-1] for figure in ("pruned int8", "0.610 5.11×", "36.0 [31.9, 40.3]"))
    page = Page(render(run))
    assert page is not None and "5.11 times as fast as the dense one" in " ".join(summary.summary(run))
    assert "The pruned model needs 50" in summary.summary(run)[0]
    level = latency("half", 1, 3.1, Ratio(1.01, 0.99, 1.03, "no difference"))
    fourth = replace(run.models[1], label="half", latency=(level,))
    assert summary.summary(replace(run, models=(*run.models, fourth)))[-1] == (
        "The half file cannot be told apart in latency from the dense one at batch 1 and classifies 38.8 % of the "
        "attacked images correctly."
    )


def test_speed_inside_the_noise_floor_is_no_difference() -> None:
    run = sample_run()
    row = latency("pruned", 1, 3.1, Ratio(1.01, 0.99, 1.03, "no difference"))
    run = replace(run, models=(run.models[0], replace(run.models[1], latency=(row,))))
    assert "no difference, 1.01×" in headline_markdown(run)
    assert any("cannot be told apart" in sentence for sentence in summary.summary(run))
    assert [tile.value for tile in summary.tiles(run) if tile.name == "Speed"] == ["no difference"]


def test_a_latency_in_doubt_has_a_star_and_a_reason() -> None:
    run = sample_run()
    row = replace(latency("pruned", 1, 1.9, Ratio(1.62, 1.58, 1.66, "faster")), load_per_core=3.5)
    run = replace(run, models=(run.models[0], replace(run.models[1], latency=(row,))))
    shown = headline_markdown(run)
    assert "| 1.90* [" in shown and "* in doubt: the machine had 3.5 running processes for each core." in shown
    assert any("in doubt, since the machine had 3.5" in sentence for sentence in summary.summary(run))


def labels(run: RunReport) -> list[str]:
    return [line.split("|")[1].strip() for line in headline_markdown(run).splitlines()[2:] if line.startswith("|")]


def with_rows(*conditions: dict[str, Any]) -> RunReport:
    """The sample with the given latencies for both of its models."""
    run = sample_run()
    rows = [
        tuple(replace(latency(model.label, 1, 2.0 + position, None), p90_ms=None, **found) for found in conditions)
        for position, model in enumerate(run.models)
    ]
    models = (replace(model, latency=found) for model, found in zip(run.models, rows, strict=True))
    return replace(run, models=tuple(models))


def test_conditions_that_differ_are_named_and_never_mixed() -> None:
    run = with_rows({"threads": 1}, {"threads": 2, "p50_ms": 1.5}, {"kind": "device", "p50_ms": 1.25})
    assert [label for label in labels(run) if "Latency" in label] == [
        "Latency b1 t1 host, ms", "Latency b1 t2 host, ms", "Latency b1 t1 device, ms",
    ]  # fmt: skip
    table = headline_markdown(run)
    for line in ("b1 t1 host, ms | 2.00 [", "b1 t2 host, ms | 1.50 [", "b1 t1 device, ms | 1.25 ["):
        assert line in table
    assert "Latency: median, ONNX Runtime CPU, 1 thread, 2 threads." in table
    assert labels(with_rows({}, {"batch": 32}))[3:5] == ["Latency b1, ms", "Latency b32, ms"]


def test_no_more_than_three_conditions_stand_in_the_table() -> None:
    run = with_rows(*({"batch": batch} for batch in (1, 2, 4, 8, 16)))
    assert [label for label in labels(run) if "Latency" in label] == [
        "Latency b1, ms",
        "Latency b2, ms",
        "Latency b4, ms",
    ]
    wide = replace(run, models=(*run.models, replace(run.models[1], label="third")))
    assert headline_markdown(wide).splitlines()[0].count(", ms") == 3
    assert [printed(wide, width).splitlines()[1].count(", ms") for width in (130, 80)] == [3, 1]


def test_lines_without_a_value_are_left_out_and_missing_ones_marked() -> None:
    run = sample_run()
    bare = replace(run, models=tuple(ModelRow(model.label, model.macs, model.params) for model in run.models))
    assert labels(bare) == ["MACs", "Parameters"]
    assert "Brackets" not in headline_markdown(bare) and "Latency" not in headline_markdown(bare)
    assert headline_markdown(run).rstrip().endswith("1 thread. Brackets: 95 % intervals.")
    half = replace(run, models=(run.models[0], replace(run.models[1], latency=(), onnx_clean=None)))
    lines = {line.split("|")[1].strip(): line.split("|")[2:5] for line in headline_markdown(half).splitlines()[2:9]}
    assert [cell.strip() for cell in lines["Latency b1, ms"]] == ["3.12 [3.09, 3.17]", "–", ""]
    assert headline_markdown(replace(run, models=())) == "|  |\n| --- |\n\n\n"


def test_changes_are_those_of_the_later_models_against_the_first() -> None:
    run = sample_run()
    faster = Ratio(1.62, 1.58, 1.66, "faster")
    dense = replace(run.models[0], latency=tuple(replace(row, speedup=faster) for row in run.models[0].latency))
    for models in ((dense, run.models[1]), (dense, run.models[1], run.models[1])):
        shown = headline_markdown(replace(run, models=models))
        (first,) = [line for line in shown.splitlines() if "3.12" in line]
        assert shown.count("1.62×") == len(models) - 1 and ("1.62×" in first) == (len(models) == 2)
    by_label = {line.split("|")[1].strip(): line for line in headline_markdown(run).splitlines() if "|" in line}
    assert by_label["MACs"].endswith("| 160.2 M | 80.05 M | −50.0 % |")
    assert by_label["Clean acc., %"].endswith("| −3.0 points |")


def test_a_name_cannot_break_the_table() -> None:
    run = sample_run()
    odd = replace(run, models=(run.models[0], replace(run.models[1], label="a|b\nc")))
    assert headline_markdown(odd).splitlines()[0] == "|  | dense | a\\|b c | change |"
