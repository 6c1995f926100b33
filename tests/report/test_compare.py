"""Several runs in one report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.report_sample import artifact, sample_run

from robust_prune.cli import app
from robust_prune.errors import UsageError
from robust_prune.evaluation.card import Accuracy
from robust_prune.report import RunReport, headline_markdown, write
from robust_prune.report.compare import compare, load_run, run_names
from robust_prune.serialization import to_json


def other_run() -> RunReport:
    run = sample_run()
    dense, pruned = run.models
    assert pruned.card is not None
    weaker = replace(pruned.card, robust=replace(pruned.card.robust, correct=150))
    return replace(run, models=(dense, replace(pruned, macs=40_000_000, card=weaker, onnx_robust=weaker.robust)))


def test_runs_from_one_dense_model_share_its_row() -> None:
    joint = compare({"half": sample_run(), "quarter": other_run()}, "robust-prune report half quarter")
    assert [model.label for model in joint.models] == ["dense", "half pruned", "quarter pruned"]
    assert joint.command == "robust-prune report half quarter" and "own run" in joint.notes[0]
    table = headline_markdown(joint).splitlines()
    assert len([line for line in table if line.startswith("|")]) == 5
    assert "| 30.0 [26.1, 34.2] (−10.6 points) |" in next(line for line in table if "quarter pruned" in line)


def test_another_dense_model_brings_its_row() -> None:
    other = other_run()
    other = replace(
        other, models=(replace(other.models[0], onnx=replace(artifact("x", 1), sha256="cd" * 32)), other.models[1])
    )
    joint = compare({"a": sample_run(), "b": other})
    assert [model.label for model in joint.models] == ["dense", "a pruned", "b dense", "b pruned"]


def test_what_was_measured_differently_does_not_share_a_table() -> None:
    other = other_run()
    dense, pruned = other.models
    assert dense.card is not None
    threat = {"norm": "linf", "epsilon": 4 / 255}
    strange = replace(other, models=(replace(dense, card=replace(dense.card, threat=threat)), pruned))
    elsewhere = replace(other, models=(replace(dense, card=replace(dense.card, images_hash="ab")), pruned))
    assert any("without paired intervals" in note for note in compare({"a": sample_run(), "b": elsewhere}).notes)
    with pytest.raises(UsageError, match="cannot stand in one table"):
        compare({"a": sample_run(), "b": strange})
    with pytest.raises(UsageError, match="at least two runs, got 1"):
        compare({"a": sample_run()})


def test_names_hold_as_much_of_the_path_as_they_need() -> None:
    assert run_names(["runs/half", "runs/quarter/"]) == ["half", "quarter"]
    assert run_names(["one/run", "two/run/result.json"]) == ["one/run", "two/run"]
    with pytest.raises(UsageError, match="same run was given twice"):
        run_names(["runs/half", "runs/half"])


def test_the_command_writes_the_joint_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(sample_run(), tmp_path / "half")
    write(other_run(), tmp_path / "quarter")
    assert load_run(tmp_path / "half") == sample_run()
    folders = [str(tmp_path / name) for name in ("half", "quarter")]
    app(["report", *folders, "--out", str(tmp_path / "both")], exit_on_error=False)
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "quarter pruned" in page and "2 runs side by side" in page
    assert load_run(tmp_path / "both").models[2].macs == 40_000_000
    assert "half pruned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no result.json"),
        ("{", "is not a result of robust-prune"),
        ("[]", "is not a result"),
        ("{}", "title: Field required"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_run(tmp_path)
    with pytest.raises(UsageError, match="no run given"):
        app(["report"], exit_on_error=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["models"][0].update(label="a\n\n# forged"), "its models or their names"),
        (lambda value: value.update(models=value["models"] * 150), "its models or their names"),
        (lambda value: value.update(models=[]), "its models or their names"),
        (
            lambda value: value["models"][0]["card"]["threat"].update(epsilon=-1),
            r"result\.json is not .*epsilon must be",
        ),
        (lambda value: value["environment"].update(deep=nested(60)), "values inside each other"),
        (lambda value: value["environment"].update(filler="x" * 31_000_000), "it has 31,.* bytes"),
    ],
)
def test_forged_results_are_refused_at_once(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    value = to_json(sample_run())
    change(value)
    (tmp_path / "result.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_run(tmp_path)


def nested(depth: int) -> Any:
    """Return lists inside each other."""
    return [nested(depth - 1)] if depth else 0


def with_verdicts(run: RunReport, images_hash: str) -> RunReport:
    found = Accuracy.of(np.arange(500) < 200)
    models = []
    for model in run.models:
        assert model.card is not None
        judged = replace(model.card, clean=found, robust=found, images_hash=images_hash)
        models.append(replace(model, card=judged, onnx_clean=None, onnx_robust=None))
    return replace(run, models=tuple(models), class_names=("cat", "dog"))


def test_only_equal_images_are_compared_in_pairs() -> None:
    one, other = with_verdicts(sample_run(), "ab"), with_verdicts(other_run(), "ab")
    joint = compare({"a": one, "b": other})
    assert "not told apart, 0 points [" in headline_markdown(joint)
    assert joint.class_names == ("cat", "dog")
    apart = compare({"a": one, "b": with_verdicts(other_run(), "cd")})
    assert "(0 points)" in headline_markdown(apart) and "points [" not in headline_markdown(apart)
    assert all(model.card is None or not model.card.robust.right for model in apart.models)
