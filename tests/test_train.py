"""Training from scratch: what makes two runs the same, what is done again, and what is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.recorded import PREPARED, recorded
from builders.report_sample import epoch
from builders.training_sample import make_images
from torch import nn

from robust_prune.attacks import ThreatModel
from robust_prune.errors import UsageError
from robust_prune.models import artifact
from robust_prune.training.types import TrainResult

WORK = {"training", "evaluation of what was trained"}
"""What is only called where a stage is made, not taken from the folder."""


def other_images(part: str) -> dict[str, Callable[..., Any]]:
    images = make_images(len(getattr(PREPARED.bundle, part)), seed=9)
    return {"data": lambda *_, **__: replace(PREPARED.bundle, **{part: images})}


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ({}, other_images("train")), ({}, other_images("validation")), ({}, other_images("test")),
        ({"training.lr": 0.01}, {}), ({"evaluation.steps": 3}, {}), ({"threat.epsilon": 0.1}, {}), ({"seed": 1}, {}),
        ({"model.arch": "cifar/resnet20_x0.5"}, {}),
    ],
    ids=["train", "validation", "test", "training", "evaluation", "threat", "seed", "architecture"],
)  # fmt: skip
def test_other_images_or_settings_are_another_run(
    values: dict[str, Any], answers: dict[str, Any], tmp_path: Path
) -> None:
    recorded("train", {}, tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds a run with another (model|data|recipe|code)"):
        recorded("train", values, tmp_path / "run", answers=answers)


@pytest.mark.parametrize("name", ["training.loss", "evaluation.tier"])
def test_a_run_with_another_version_of_a_users_file_is_another_run(name: str, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def mine(*_):\n    return None\n")
    recorded("train", {name: f"{source}:mine"}, tmp_path / "run", {"training"})
    source.write_text("def mine(*_):\n    return 1\n")
    with pytest.raises(UsageError, match=r"holds a run with another (model|data|recipe|code)"):
        recorded("train", {name: f"{source}:mine"}, tmp_path / "run", {"training"})


def test_what_training_does_not_depend_on_is_no_part_of_its_identity(tmp_path: Path) -> None:
    recorded("train", {}, tmp_path / "run")
    assert not WORK & set(recorded("train", {"pruning.ratio": 0.9, "bench.seconds": 1}, tmp_path / "run").called)


def trained_further(model: nn.Module, *_: Any, **__: Any) -> TrainResult:
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    return TrainResult((epoch(1, 0.9),), 1)


@pytest.mark.parametrize(
    ("lost", "answers", "again"),
    [
        ("train/stage.json", {}, {"training"}),
        ("model.safetensors", {}, WORK),  # all that follows is done again: what was there cannot be checked
        ("train/stage.json", {"training": trained_further}, WORK),
        ("evaluate/stage.json", {}, {"evaluation of what was trained"}),
    ],
)
def test_what_is_gone_or_depends_on_what_changed_is_made_anew(
    lost: str, answers: dict[str, Any], again: set[str], tmp_path: Path
) -> None:
    recorded("train", {}, tmp_path / "run")
    assert not WORK & set(recorded("train", {}, tmp_path / "run").called)
    (tmp_path / "run" / lost).unlink()
    assert WORK & set(recorded("train", {}, tmp_path / "run", answers=answers).called) == again


def test_the_first_weights_follow_the_seed(tmp_path: Path) -> None:
    def begun(seed: int, name: str) -> str:
        arguments, _ = recorded("train", {"seed": seed}, tmp_path / name, {"training"}).first["training"]
        return arguments[0]

    assert begun(0, "a") == begun(0, "b") != begun(1, "c")


def test_the_file_and_the_report_hold_what_was_trained(tmp_path: Path) -> None:
    found = recorded(
        "train", {"threat.norm": "l2", "threat.epsilon": 0.5}, tmp_path / "run",
        answers={"data": lambda *_, **__: replace(PREPARED.bundle, notes=("a caution",)), "training": trained_further},
    )  # fmt: skip
    model = artifact.load(tmp_path / "run" / "model.safetensors")
    assert model.threat == ThreatModel("l2", 0.5) and model.provenance["command"] == "command"
    assert model.spec.class_names == ("a", "b", "c") and model.spec.mean == PREPARED.bundle.mean
    report = found.report
    assert report is not None
    (row,) = report.models
    assert row.params == sum(parameter.numel() for parameter in model.module.parameters()) and row.macs > row.params
    assert row.card is not None and (row.card.macs, row.card.params) == (row.macs, row.params)
    assert report.notes == ("a caution",) and [record.train_loss for record in report.history] == [0.9]
    assert set(report.seconds) == {"preflight", "train", "evaluate"} and report.command == "command"
    arguments, _ = found.first["evaluation of what was trained"]
    assert arguments[0] != found.first["training"][0][0], "what was evaluated are the weights before training"
