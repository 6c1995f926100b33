"""A model for each ratio: what they share, what is reported after each, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.recorded import PREPARED, patched
from builders.report_sample import latency

from robust_prune.bench.types import LatencyTable
from robust_prune.errors import QualityGateError, UsageError
from robust_prune.job import Compressed, Compression
from robust_prune.ratios import distinct, frontier
from robust_prune.recipe_reader import load
from robust_prune.report import RunReport
from robust_prune.report.files import write
from robust_prune.runs.cache import Cache


def timed(files: Any, *_: Any) -> LatencyTable:
    """Latencies that tell the files apart: 1 ms, 2 ms, ..."""
    rows = [latency(name, 1, float(number), None) for number, (name, _) in enumerate(files, start=1)]
    return LatencyTable(tuple(rows), {}, {}, "")


def run(
    folder: Path, ratios: list[float], answers: dict[str, Callable[..., Any]] | None = None, **values: Any
) -> tuple[Compressed | None, list[str]]:
    """The frontier of the prepared model, and the stages that were called."""
    recipe = load(None, {name.replace("__", "."): value for name, value in values.items()})
    job = Compression(
        "toy", PREPARED.dense, PREPARED.bundle, recipe, folder / "run", "command", Cache(folder / "cache")
    )
    with patched({"latency": timed, **(answers or {})}) as recorder:
        return frontier(job, ratios), recorder.called


def labels(report: RunReport) -> list[str]:
    return [model.label for model in report.models]


def test_each_ratio_is_a_run_and_what_is_of_the_dense_model_is_done_once(tmp_path: Path) -> None:
    done, called = run(tmp_path, [0.75, 0.3, 0.75])
    assert done is not None and labels(done.report) == ["dense", "cut by 30 %", "cut by 75 %"]
    once = {"groups", "sensitivity", "channel scores", "check of the dense model", "latency"}
    assert {stage: called.count(stage) for stage in once} == dict.fromkeys(once, 1)
    assert called.count("fine-tuning") == 2 and called.count("evaluation") == 3
    for name in ("30", "75"):
        assert (tmp_path / "run" / name / "model.safetensors").exists()
        assert f"ratio: 0.{name.rstrip(chr(48))}" in (tmp_path / "run" / name / "recipe.yaml").read_text()


def test_all_are_timed_together_and_each_run_has_its_own_rows(tmp_path: Path) -> None:
    seen: dict[Path, RunReport] = {}
    done, _ = run(tmp_path, [0.3, 0.75], {"write": lambda made, folder, *_: seen.update({folder: made})})
    assert done is not None
    assert {m.label: m.latency[0].p50_ms for m in done.report.models} == {
        "dense": 1,
        "cut by 30 %": 2,
        "cut by 75 %": 3,
    }
    for name, time in (("30", 2), ("75", 3)):
        own = seen[tmp_path / "run" / name]
        assert {model.label: model.latency[0].p50_ms for model in own.models} == {"dense": 1, "pruned": time}


def test_it_is_reported_after_each_ratio_and_extended_by_others(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def note(made: RunReport, folder: Path, *_: Any) -> None:
        if folder.name == "run":
            seen.append(labels(made))

    run(tmp_path, [0.3, 0.75], {"write": note})
    assert seen == [["dense", "cut by 30 %"], *[["dense", "cut by 30 %", "cut by 75 %"]] * 2]
    _, called = run(tmp_path, [0.3, 0.5, 0.75], {"write": note})
    assert called.count("fine-tuning") == 1 and seen[-1] == ["dense", "cut by 30 %", "cut by 50 %", "cut by 75 %"]
    with pytest.raises(UsageError, match="holds a run with another recipe"):
        run(tmp_path, [0.3], seed=5)


def test_a_finished_frontier_is_reported_again_and_nothing_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def seen() -> tuple[str, float]:
        report = tmp_path / "run" / "report.html"
        return capsys.readouterr().out, report.stat().st_mtime_ns

    run(tmp_path, [0.3, 0.75], {"write": write})
    _, written = seen()
    _, called = run(tmp_path, [0.3, 0.75], {"write": write})
    text, again = seen()
    assert "Already done: nothing was computed" in text and "damaged" not in text and again == written
    assert not {"fine-tuning", "evaluation", "latency"} & set(called)
    run(tmp_path, [0.3, 0.5, 0.75], {"write": write})
    text, again = seen()
    assert "damaged" not in text and again > written


def test_files_and_the_rival_of_each_point_are_named_by_its_ratio(tmp_path: Path) -> None:
    done, _ = run(tmp_path, [0.3], baseline__kind="scratch", export__precisions=["int8"])
    assert done is not None
    assert labels(done.report) == ["dense", "cut by 30 %", "cut by 30 % int8", "cut by 30 % scratch"]


def test_a_ratio_that_fails_is_named_and_the_others_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(times: int) -> Callable[..., Any]:
        count = 0

        def surgery(*_: Any) -> Any:
            nonlocal count
            count += 1
            if count == times:
                raise QualityGateError("the pruned model differs")
            return PREPARED.surgery

        return surgery

    done, _ = run(tmp_path, [0.3, 0.5, 0.75], {"surgery": failing(2)})
    assert done is not None and labels(done.report) == ["dense", "cut by 30 %", "cut by 75 %"]
    assert "cut by 50 %: the pruned model differs" in done.report.notes
    with pytest.raises(QualityGateError, match="the pruned model differs"):
        run(tmp_path / "other", [0.3, 0.5], {"surgery": failing(1)})


def test_ratios_that_share_a_name_are_one(tmp_path: Path) -> None:
    assert distinct([0.5000001, 0.5, 0.3]) == [0.3, 0.5]
    for odd in ([0.5, 0.99999], [1e-6]):
        with pytest.raises(UsageError, match=r"ratios must be from 0\.0001 to 0\.9999"):
            distinct(odd)


def test_models_of_other_ratios_in_the_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [0.3, 0.75])
    run(tmp_path, [0.5, 0.75])
    assert "also holds 30, which the report leaves out" in " ".join(capsys.readouterr().out.split())


def test_without_a_cache_of_the_users_the_folder_has_one(tmp_path: Path) -> None:
    job = Compression("toy", PREPARED.dense, PREPARED.bundle, load(None, {}), tmp_path / "run", "command")
    with patched({"latency": timed}) as recorder:
        frontier(replace(job, cache=Cache()), [0.3, 0.75])
    assert recorder.called.count("sensitivity") == 1 and (tmp_path / "run" / "cache").is_dir()
