"""The search for the smallest model that keeps a wanted robust accuracy, and what its verdicts are worth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.recorded import PREPARED, Recorder, patched
from builders.report_sample import card, epoch
from builders.training_sample import make_images
from torch import nn

from robust_prune import goal as searching
from robust_prune.data.base import DataBundle, Subset, stratified
from robust_prune.errors import EnvironmentProblem, QualityGateError, UsageError
from robust_prune.evaluation.card import ResultCard
from robust_prune.evaluation.state import EvalState
from robust_prune.goal import RATIOS, Goal, goal_of, judges, largest, reach, verdict
from robust_prune.job import Compressed, Compression
from robust_prune.recipe_reader import load
from robust_prune.runs.cache import Cache
from robust_prune.training.types import TrainResult

LEAST = Goal(min_robust=0.42)


@pytest.mark.parametrize("wanted", [None, *RATIOS])
def test_the_search_finds_the_largest_ratio_in_few_tries(wanted: float | None) -> None:
    tried: list[float] = []

    def meets(ratio: float) -> bool:
        tried.append(ratio)
        return wanted is not None and ratio <= wanted

    assert largest(meets) == wanted and len(tried) <= 5 and len(set(tried)) == len(tried)


@pytest.mark.parametrize("goal", [Goal(min_robust=0.38), Goal(max_drop=0.02)])
def test_a_promise_is_kept_on_test_images_in_nine_of_ten_searches(goal: Goal) -> None:
    share, promised, kept = 0.42, 0, 0
    for seed in range(400):
        generator = np.random.default_rng(seed)

        def drawn(ratio: float, dense: np.ndarray, generator: np.random.Generator = generator) -> np.ndarray:
            """Outcomes of a model that loses a point with each tenth, and 15 % of the dense one's images."""
            other = (share - 0.1 * ratio - 0.85 * share) / (1 - share)
            return generator.random(len(dense)) < np.where(dense, 0.85, other)

        held_out, test = (generator.random(count) < share for count in (1000, 2000))
        verdicts = {ratio: verdict(goal, ratio, drawn(ratio, held_out), held_out, len(test)) for ratio in RATIOS}
        best = largest(lambda ratio, found=verdicts: found[ratio].meets)  # type: ignore[misc]
        if best is not None:
            promised += 1
            kept += goal.met(float(drawn(best, test).mean()), float(test.mean()))
    assert promised > 100 and kept >= 0.9 * promised, (promised, kept)


def test_few_images_that_all_agree_prove_little() -> None:
    right = np.ones(24, dtype=bool)
    found = verdict(Goal(min_robust=0.9), 0.5, right, right, 60)
    assert not found.meets and 0.8 < found.bound < 0.9  # the exact bound of 24 of 24 is 88 %
    found = verdict(Goal(max_drop=0.02), 0.5, right, right, 60)
    assert not found.meets and -0.15 < found.bound < -0.05
    many = np.ones(5000, dtype=bool)
    assert verdict(Goal(min_robust=0.99), 0.5, many, many, 5000).meets


def test_a_goal_is_one_of_two_and_in_percent() -> None:
    assert goal_of(38, None) == Goal(min_robust=0.38) and goal_of(None, 2) == Goal(max_drop=0.02)
    assert str(goal_of(None, 0.5)) == "robust accuracy at most 0.5 points below the dense model"
    for arguments, words in (
        ((None, None), "Give one of them"), ((38, 2), "Give one of them"),
        ((0.38, None), "in percent, got 0.38. Try 38"),
        ((120, None), "must be in (0, 100) %, got 120"), ((None, -1), "must be in [0, 100) points, got -1"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as error:
            goal_of(*arguments)
        assert words in str(error.value)


def test_those_held_out_images_judge_that_chose_no_epoch() -> None:
    def of(held_out: int) -> Compression:
        images = make_images(held_out, 1)
        bundle = DataBundle(
            "toy", make_images(90), images, make_images(24, 2), ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, (3, 8, 8)
        )
        return Compression("toy", PREPARED.dense, bundle, load(None, {"finetune.validation_images": 100}))

    many = of(400)
    chosen = stratified(many.data.validation, 100)
    assert isinstance(chosen, Subset) and isinstance(judges(many), Subset)
    found = judges(many)
    assert isinstance(found, Subset) and len(found) == 300
    assert not set(found.indices.tolist()) & set(chosen.indices.tolist())
    few = of(150)
    assert judges(few) is few.data.validation
    with pytest.raises(UsageError, match=r"there are none\. Set data\.validation"):
        judges(of(0))


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shares: dict[str, float], goal: Goal = LEAST, **answers: Any
) -> tuple[Compressed | None, Recorder, list[str]]:
    """A search over prepared models, of which `shares` gives the robust accuracy on held-out images by folder."""
    judged: list[str] = []

    def evaluated(*_: Any, state_path: Path, **__: Any) -> ResultCard:
        name = state_path.parent.parent.name
        judged.append(name)
        state = EvalState.fresh("", 1000)
        state.robust[: round(1000 * shares[name])] = True
        state.save(state_path)
        return card(name, 20, 10, 24)

    def trained(model: nn.Module, *_: Any, **__: Any) -> TrainResult:
        with torch.no_grad():
            next(model.parameters()).add_(torch.rand(()))  # each model is another one
        return TrainResult((epoch(1, 0.9),), 1)

    monkeypatch.setattr(searching, "evaluate", evaluated)
    job = Compression(
        "toy", PREPARED.dense, PREPARED.bundle, load(None, {}), folder / "run", "command", Cache(folder / "cache")
    )
    with patched({"fine-tuning": trained, **answers}) as recorder:
        return reach(job, goal), recorder, judged


SHARES = {"run": 0.6, **{f"{100 * ratio:g}": 0.6 if ratio <= 0.6 else 0.4 for ratio in RATIOS}}


def test_the_model_found_is_reported_with_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, recorder, judged = run(tmp_path, monkeypatch, SHARES)
    assert judged == ["run", "50", "75", "60", "65"] and recorder.called.count("fine-tuning") == 4
    assert done is not None and done.folder == tmp_path / "run" / "60"
    (note,) = (note for note in done.report.notes if note.startswith("Goal: "))
    assert "robust accuracy of at least 42 %, kept on test images with 90 % confidence" in note
    assert "50 %: 60.0 % (bound +" in note and "75 %: 40.0 % (bound +" in note and "missed); 60 %" in note
    # Test images judge the model found alone: it, and the dense one.
    assert recorder.called.count("evaluation") == 2
    again, recorder, judged = run(tmp_path, monkeypatch, SHARES)
    assert again is not None and again.report.models == done.report.models
    assert judged == [] and "fine-tuning" not in recorder.called


def test_a_missed_goal_on_test_images_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, monkeypatch, SHARES)  # the prepared cards have 10 of 24
    text = " ".join(capsys.readouterr().out.split())
    assert "Note: robust accuracy of at least 42 %: missed on test images (41.7 %, dense 41.7 %)." in text


def test_a_drop_is_judged_against_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"run": 0.6, **{f"{100 * ratio:g}": 0.6 - 0.1 * ratio for ratio in RATIOS}}
    done, *_ = run(tmp_path, monkeypatch, shares, Goal(max_drop=0.05))
    assert done is not None and 0.05 <= float(done.folder.name) / 100 < 0.5


def test_what_cannot_be_met_is_said_with_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QualityGateError, match=r"the dense model has 40\.0 % on 1,000 held-out images"):
        run(tmp_path / "one", monkeypatch, {"run": 0.4})
    with pytest.raises(QualityGateError, match=r"no ratio from 5 % meets the goal.*50 %: 40\.0 %.*; 5 %: 40\.0 %"):
        run(tmp_path / "two", monkeypatch, {"run": 0.6, **dict.fromkeys((f"{100 * r:g}" for r in RATIOS), 0.4)})


def test_what_says_nothing_of_a_ratio_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise EnvironmentProblem("the disk is full")

    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        run(tmp_path, monkeypatch, SHARES, surgery=full)


def test_a_ratio_that_fails_does_not_meet_the_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Callable[..., Any]:
        count = 0

        def surgery(*_: Any) -> Any:
            nonlocal count
            count += 1
            if count == 2:
                raise QualityGateError("the pruned model differs")
            return PREPARED.surgery

        return surgery

    everything = {"run": 0.6, **dict.fromkeys((f"{100 * ratio:g}" for ratio in RATIOS), 0.6)}
    done, *_ = run(tmp_path, monkeypatch, everything, surgery=failing())
    assert done is not None and done.folder.name == "70"
    assert any("75 %: the pruned model differs" in note for note in done.report.notes)
