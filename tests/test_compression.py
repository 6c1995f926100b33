"""The main job: what makes two runs the same, what is done again when something before it changed, what is reported."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.recorded import PREPARED, recorded
from builders.report_sample import artifact as onnx_artifact
from builders.report_sample import card, epoch, latency
from builders.training_sample import make_images
from torch import nn

from robust_prune import baseline, compression
from robust_prune.attacks import ThreatModel
from robust_prune.bench.types import LatencyTable, Ratio
from robust_prune.budget.plan import make_plan
from robust_prune.errors import UsageError
from robust_prune.evaluation.card import Accuracy, ExportedAccuracy, ResultCard
from robust_prune.evaluation.dense_check import DenseCheck
from robust_prune.exporters.types import OnnxArtifact
from robust_prune.job import Compression, Cut, Planned, Pruned
from robust_prune.models.artifact import Model
from robust_prune.recipe import PruningSection, Recipe
from robust_prune.recipe_reader import load
from robust_prune.report import RunReport
from robust_prune.runs.cache import Cache
from robust_prune.runs.run import Run
from robust_prune.structure.types import Skipped
from robust_prune.training.types import TrainResult

WORK = {
    "groups", "plan", "surgery", "fine-tuning", "export", "evaluation", "latency",
    "length from scratch", "check of the dense model",
}  # fmt: skip
"""What is only called where a stage is made, not taken from the folder."""


# --- the identity of a run -----------------------------------------------------------------------------------------


def _other_images(part: str) -> Callable[..., Any]:
    return lambda *_, **__: replace(PREPARED.bundle, **{part: make_images(len(getattr(PREPARED.bundle, part)), seed=9)})


def _other_weights(*_: Any, **__: Any) -> Model:
    module = PREPARED.reopened()
    with torch.no_grad():
        next(module.parameters()).add_(1e-3)
    return replace(PREPARED.dense, module=module)


def _other_names(*_: Any, **__: Any) -> Model:
    return replace(PREPARED.dense, spec=replace(PREPARED.dense.spec, class_names=("x", "y", "z")))


@pytest.mark.parametrize(
    "answers",
    [
        {"data": _other_images("train")}, {"data": _other_images("validation")}, {"data": _other_images("test")},
        {"model": _other_weights}, {"model": _other_names},
    ],
    ids=["train", "validation", "test", "weights", "class names"],
)  # fmt: skip
def test_a_run_on_other_images_or_of_another_model_is_another_run(answers: dict[str, Any], tmp_path: Path) -> None:
    recorded("compress", {}, tmp_path / "run", {"plan"})
    with pytest.raises(UsageError, match=r"holds a run with another (model|data|recipe|code)"):
        recorded("compress", {}, tmp_path / "run", {"plan"}, answers)
    assert "plan" in recorded("compress", {}, tmp_path / "run", {"plan"}).called


PLANNING = {"groups", "adversarial set", "sensitivity", "channel scores"}


@pytest.mark.parametrize(
    ("answers", "again", "judged"),
    [
        ({"data": _other_images("train")}, {*PLANNING, "attacked images of the repair", "check of the dense model"}, 1),
        ({"data": _other_images("validation")}, {"check of the dense model"}, 1),
        ({"data": _other_images("test")}, set(), 2),
        ({"data": lambda *_, **__: replace(PREPARED.bundle, name="other")}, set(), 2),
        ({"model": _other_weights}, {*PLANNING, "attacked images of the repair", "check of the dense model"}, 2),
        ({"model": _other_names}, {*PLANNING, "attacked images of the repair", "check of the dense model"}, 2),
    ],
    ids=["train", "validation", "test", "name of the data", "weights", "class names"],
)  # fmt: skip
def test_nothing_of_another_model_or_other_images_is_taken_from_the_cache(
    answers: dict[str, Any], again: set[str], judged: int, tmp_path: Path
) -> None:
    store = Cache(tmp_path / "cache")
    recorded("compress", {}, tmp_path / "one", cache=store)
    called = recorded("compress", {}, tmp_path / "two", answers=answers, cache=store).called
    assert {*PLANNING, "attacked images of the repair", "check of the dense model"} & set(called) == again
    assert called.count("evaluation") == judged, "of the pruned model, and of the dense one where it is not the same"


def test_scores_by_another_version_of_a_users_file_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    source, store = tmp_path / "mine.py", Cache(tmp_path / "cache")
    values = {"pruning.criterion": f"{source}:mine"}
    for number, body in enumerate(("return None", "return 1")):
        source.write_text(f"def mine(*_):\n    {body}\n")
        called = recorded("compress", values, tmp_path / f"run{number}", {"plan"}, cache=store).called
        assert "channel scores" in called and ("sensitivity" in called) == (number == 0)


@pytest.mark.parametrize(
    "name",
    ["finetune.loss", "training.loss", "pruning.criterion", "pruning.allocation", "evaluation.tier"],
)
def test_a_run_with_another_version_of_a_users_file_is_another_run(name: str, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def mine(*_):\n    return None\n")
    values = {name: f"{source}:mine"}
    recorded("compress", values, tmp_path / "run", {"plan"})
    source.write_text("def mine(*_):\n    return 1\n")
    with pytest.raises(UsageError, match=r"holds a run with another (model|data|recipe|code)"):
        recorded("compress", values, tmp_path / "run", {"plan"})


# --- what is done again --------------------------------------------------------------------------------------------


def _plan_of(ratio: float) -> Callable[..., Any]:
    return lambda *_: make_plan(PREPARED.analysis, PruningSection(ratio=ratio))


def _trained_further(model: nn.Module, *_: Any, **__: Any) -> TrainResult:
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    return TrainResult((epoch(1, 0.9),), 1)


def _file_of(content: str) -> Callable[..., OnnxArtifact]:
    def exported(*arguments: Any) -> OnnxArtifact:
        path = Path(arguments[3])
        path.write_text(content)
        return replace(onnx_artifact(path.stem, 4), path=str(path), sha256=content)

    return exported


@pytest.mark.parametrize(
    ("lost", "answers", "again"),
    [
        ("dense", {}, {"check of the dense model"}),
        ("plan", {}, {"groups", "plan"}),
        ("plan", {"plan": _plan_of(0.3)}, {"groups", "plan", "surgery", "fine-tuning"}),
        ("finetune", {}, {"fine-tuning"}),
        ("finetune", {"fine-tuning": _trained_further}, {"fine-tuning", "export", "evaluation"}),
        ("export-pruned", {"export": _file_of("other")}, {"export", "evaluation", "latency"}),
        ("evaluate-dense", {}, {"evaluation"}),
        ("bench", {}, {"latency"}),
    ],
    ids=["check", "plan", "another plan", "training", "other weights", "another file", "card", "table"],
)
def test_what_depends_on_a_stage_is_made_anew_where_its_outcome_changed(
    lost: str, answers: dict[str, Any], again: set[str], tmp_path: Path
) -> None:
    recorded("compress", {}, tmp_path / "run")
    assert not WORK & set(recorded("compress", {}, tmp_path / "run").called)
    (tmp_path / "run" / lost / "stage.json").unlink()
    assert WORK & set(recorded("compress", {}, tmp_path / "run", answers=answers).called) == again


# --- cuts ----------------------------------------------------------------------------------------------------------


def _job(recipe: Recipe, folder: Path) -> Compression:
    return Compression("toy", PREPARED.dense, PREPARED.bundle, recipe, folder, "command")


def _cut(seconds: float) -> Cut:
    tuned = TrainResult((replace(epoch(1, 1.0), seconds=seconds), replace(epoch(2, 1.0), seconds=seconds)), 1)
    plan = _plan_of(0.3)()
    pruned = Pruned((), 0.0)
    return Cut(Planned(PREPARED.analysis.profile, plan), pruned, tuned, plan)  # type: ignore[arg-type]


def test_a_later_cut_takes_its_share_of_what_is_left_and_knows_the_dense_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(compression, "analyse", lambda *arguments: asked.append(arguments) or PREPARED.analysis)
    monkeypatch.setattr(compression, "make_plan", lambda _, section: asked.append(section) or PREPARED.plan)
    job = _job(load(None, {"pruning.ratio": 0.75, "pruning.cuts": 2}), tmp_path)
    before = _cut(1.0)
    compression.next_cut(job, PREPARED.surgery.model, [before])
    (known, dense_widths), section = asked
    assert known.model is PREPARED.surgery.model and known.images is PREPARED.bundle.train
    assert dense_widths == {group.name: group.channels for group in before.plan.groups}
    left = before.plan.macs_after / before.plan.macs_before
    assert left * (1 - section.ratio) == pytest.approx(0.25)


@pytest.mark.parametrize(("before", "wanted"), [(0, 0.5), (1, 0.25)])
def test_a_latency_falls_in_equal_shares_and_is_that_of_the_dense_model(
    before: int, wanted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    kept = {True: 0.6, False: 0.4}
    clock = SimpleNamespace(
        kept=lambda model: kept[model is PREPARED.surgery.model], priced=lambda analysis, model: analysis
    )
    monkeypatch.setattr(compression.CandidateClock, "open", lambda *_: _opened(clock))
    monkeypatch.setattr(compression, "analyse", lambda *_: PREPARED.analysis)
    monkeypatch.setattr(compression, "plan_for_latency", lambda *arguments: asked.append(arguments) or PREPARED.plan)
    job = _job(load(None, {"pruning.metric": "latency", "pruning.ratio": 0.75, "pruning.cuts": 2}), tmp_path)
    model = PREPARED.surgery.model if before else job.dense.module
    compression.next_cut(job, model, [_cut(1.0)] * before)
    ((_, section, share, present, measure, conditions),) = asked
    assert (section.ratio, conditions) == (0.75, "batch 1, 1 thread, cpu")
    assert share == pytest.approx(wanted) and present == (0.6 if before else 1.0)
    assert measure(PREPARED.plan) == 0.4  # of the model that comes out of the cut


class _opened:  # noqa: N801
    def __init__(self, value: Any) -> None:
        self.value = value

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *_: Any) -> None:
        return None


def test_groups_that_stayed_whole_are_no_part_of_what_was_cut(tmp_path: Path) -> None:
    plan = _plan_of(0.5)()
    pruned = Pruned((Skipped(plan.groups[0].name, "why"),), 0.0)
    real = compression.what_was_cut(plan, pruned, _job(Recipe(), tmp_path), PREPARED.dense.module)
    assert real.groups[0].removed == () != plan.groups[0].removed and real.groups[1:] == plan.groups[1:]
    assert (real.macs_after, real.params_after) == (plan.macs_before, plan.params_before)


# --- the network from scratch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 2 * (3.0 + 5.0)), (2.0, 120.0)])
def test_the_rival_is_trained_as_long_as_all_fine_tuning_took_or_as_the_recipe_says(
    minutes: float | None, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(baseline, "affordable", lambda *arguments, **_: asked.append(arguments) or (3, 64))
    tuned = TrainResult((epoch(1, 1.0),), 1)
    monkeypatch.setattr(baseline, "train", lambda *arguments, **_: asked.append(arguments) or tuned)
    values = {"baseline.kind": "scratch", "baseline.minutes": minutes, "training.epochs": 30}
    job = _job(load(None, values), tmp_path)
    cuts = [_cut(3.0), _cut(5.0)]
    _, note = baseline.train_from_scratch(job, Run(tmp_path, "key"), PREPARED.surgery.model, cuts)
    (_, images, threat, settings, given), (model, subset, held_out, _, shortened) = asked
    assert given == pytest.approx(seconds) and images is job.data.train
    assert (settings.epochs, shortened.epochs, len(subset)) == (30, 3, 64)
    assert held_out is job.data.validation and threat == job.recipe.threat_model
    shapes = [tensor.shape for tensor in model.state_dict().values()]
    assert shapes == [tensor.shape for tensor in PREPARED.surgery.model.state_dict().values()]
    assert "fine-tuning the pruned model took 16 s" in note and "3 epochs of 64 images" in note


# --- the report ----------------------------------------------------------------------------------------------------


def reported(values: dict[str, Any], folder: Path, **answers: Any) -> tuple[RunReport, dict[str, Any]]:
    found = recorded("compress", values, folder, answers={k.replace("_", " "): v for k, v in answers.items()})
    assert found.report is not None
    return found.report, found.first


def test_the_report_holds_what_the_stages_found(tmp_path: Path) -> None:
    whole = Skipped("backbone.conv1", "why")
    floor = {"batch 1 x 1 thread": (1.0, 0.9, 1.1)}

    def timed(files: Any, *_: Any) -> LatencyTable:
        rows = tuple(latency(label, 1, 2.0, None) for label, _ in files)
        return LatencyTable(rows, floor, {"load": 0.5}, "interleaved")

    report, stages = reported(
        {"baseline.kind": "scratch"}, tmp_path / "run",
        data=lambda *_, **__: replace(PREPARED.bundle, notes=("a caution",)),
        surgery=lambda *_: replace(PREPARED.surgery, rolled_back=(whole,)),
        latency=timed,
    )  # fmt: skip
    assert [model.label for model in report.models] == ["dense", "pruned", "scratch"]
    assert all(model.macs and model.params and model.card and model.onnx for model in report.models)
    assert [model.latency[0].label for model in report.models] == ["dense", "pruned", "scratch"]
    assert report.models[0].macs > report.models[1].macs == report.models[2].macs
    assert report.notes[0] == "a caution" and report.notes[-1].startswith("scratch: the pruned architecture")
    assert report.rolled_back == (whole,)
    assert [record.epoch for record in report.history] == [1]
    assert report.profile == PREPARED.analysis.profile and report.plan is not None
    assert report.environment == {"bench": {"load": 0.5}}
    assert (report.noise_floor, report.latency_protocol) == (floor, "interleaved")
    assert report.recipe["baseline"]["kind"] == "scratch" and report.command == "command"
    assert {"plan", "prune", "finetune", "export-dense", "evaluate-pruned", "bench"} <= set(report.seconds)
    (models, images, _, names), options = stages["examples"]
    assert list(models) == ["dense", "pruned"] and options["attacked"] == "pruned" and names == ["a", "b", "c"]
    assert images == stages["evaluation"][0][1]  # test images, as in the evaluation


def test_files_of_lower_precision_have_rows_of_their_own(tmp_path: Path) -> None:
    report, stages = reported({"export.precisions": ["fp16", "int8"]}, tmp_path / "run")
    assert [model.label for model in report.models] == ["dense", "pruned", "pruned fp16", "pruned int8"]
    assert [model.card is None for model in report.models] == [False, False, True, True]
    assert [model.file_bytes for model in report.models] == [4, 4, 2, 2]
    files = [Path(model.onnx.path).name for model in report.models if model.onnx]
    assert files == ["dense.onnx", "model.onnx", "model.fp16.onnx", "model.int8.onnx"]
    assert [label for label, _ in stages["latency"][0][0]] == [model.label for model in report.models]


def test_alarms_and_notes_are_printed_once_with_the_models_to_which_they_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(*_: Any, subject: Any, exported: Any = None, **__: Any) -> ResultCard:
        flags = {
            "dense": ("Both.",),
            "pruned": ("Both.", "Pruned [alone]."),
        }
        found = card(subject.model, 20, 10, 24)
        right = ExportedAccuracy(found.clean, found.robust)
        return replace(
            found, split=subject.split, flags=flags[subject.model], exported=dict.fromkeys(exported or {}, right)
        )

    reported(
        {}, tmp_path / "run", evaluation=evaluated,
        data=lambda *_, **__: replace(PREPARED.bundle, notes=("a caution", "a caution")),
    )  # fmt: skip
    below = capsys.readouterr().out.partition("\nRobust: ")[2]  # notes on data are also printed where they are opened
    lines = [line for line in below.splitlines() if line.startswith(("Alarm", "Note"))]
    assert lines == [
        "Alarm: dense, pruned: Both.",
        "Alarm: pruned: Pruned [alone].",
        "Note: a caution",
    ]


def test_a_dense_model_without_robustness_is_said_to_be_so_before_it_is_cut_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = DenseCheck("held-out", Accuracy(18, 20), Accuracy(0, 20), 0.3, 3, ThreatModel())
    report, _ = reported({}, tmp_path / "run", **{"check_of_the_dense_model": lambda *_: nothing})
    text = " ".join(capsys.readouterr().out.split())
    said = "Note: robust accuracy of the dense model is 0.0 % under Linf 8/255: there is no robustness to keep"
    assert "Dense model on 20 held-out images: clean 90.0 %, robust 0.0 % (PGD-10, Linf 8/255) " + said in text
    assert text.index(said) < text.index("Sensitivity and plan") and text.count(said) == 2
    assert nothing.note() in report.notes


@pytest.mark.parametrize(
    ("values", "count"), [({}, 11), ({"baseline.kind": "scratch"}, 15), ({"export.precisions": ["fp16"]}, 12)]
)
def test_stages_are_numbered_in_order_and_none_is_missing(
    values: dict[str, Any], count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded("compress", values, tmp_path / "run")
    stages = re.findall(r"^\[(\d+)/(\d+)\] [A-Z]", capsys.readouterr().out, re.MULTILINE)
    assert stages == [(str(number), str(count)) for number in range(1, count + 1)]


@pytest.mark.parametrize(("speedup", "said"), [(2.0, False), (1.6, True)])
def test_a_latency_that_the_final_file_does_not_keep_is_said(speedup: float, said: bool, tmp_path: Path) -> None:
    def timed(files: Any, *_: Any) -> LatencyTable:
        ratio = Ratio(speedup, speedup, speedup, "faster")
        rows = (latency("dense", 1, 2.0, None), latency("pruned", 1, 2.0 / speedup, ratio))
        return LatencyTable(rows, {}, {}, "")

    report, _ = reported({"pruning.metric": "latency", "pruning.ratio": 0.5}, tmp_path / "run", latency=timed)
    assert any("the final file takes 62.5% of the dense latency" in note for note in report.notes) == said
