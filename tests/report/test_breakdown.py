"""Charts of robust accuracy by class and by radius."""

from __future__ import annotations

from dataclasses import replace

from builders.report_sample import sample_run

from robust_prune.evaluation.card import Accuracy, ClassAccuracy
from robust_prune.report import breakdown
from robust_prune.report.html import render
from robust_prune.report.types import RunReport


def judged(before: list[int], after: list[int], **changes: object) -> RunReport:
    """A run whose models are right on so many of 50 attacked images of each class."""
    run = sample_run()
    models = []
    for model, found in zip(run.models, (before, after), strict=True):
        assert model.card is not None
        classes = tuple(ClassAccuracy(label, 50, 50, robust) for label, robust in enumerate(found))
        models.append(replace(model, card=replace(model.card, per_class=classes)))
    return replace(run, models=tuple(models), **changes)


def test_the_class_that_loses_most_is_first() -> None:
    run = judged([25, 25, 25], [24, 10, 30], class_names=("cat", "<dog>", "ship"))
    rows, count = breakdown.class_rows(run)
    assert [row.name for row in rows] == ["<dog>", "cat", "ship"] and count == 3
    assert rows[0].shares == (0.5, 0.2)
    drawn = breakdown.by_class(run)
    assert drawn.count("<circle") == 2 + 2 * 3 and "&lt;dog&gt;" in drawn and "<dog>" not in drawn
    assert "the class that loses most is at the top" in render(run)


def test_of_many_classes_both_ends_are_shown() -> None:
    run = judged([25] * 30, list(range(30)))
    rows, count = breakdown.class_rows(run)
    assert count == 30 and [row.name for row in rows] == [str(i) for i in (*range(10), *range(20, 30))]
    assert "Of 30 classes, the ten at either end." in render(run)


def test_one_model_alone_is_drawn_from_its_worst_class_on() -> None:
    run = judged([30, 10, 20], [0, 0, 0])
    alone = replace(run, models=run.models[:1])
    assert [row.name for row in breakdown.class_rows(alone)[0]] == ["1", "2", "0"]
    assert breakdown.by_class(alone).count("<circle") == 1 + 3
    assert "loses most" not in render(alone)


def test_what_was_not_measured_is_not_drawn() -> None:
    run = sample_run()
    assert breakdown.by_class(run) == breakdown.by_radius(run) == ""
    assert "By class and by radius" not in render(run)


def test_the_sweep_is_drawn_with_its_intervals() -> None:
    run = sample_run()
    model = run.models[1]
    assert model.card is not None
    sweep = tuple((steps / 255, Accuracy(80 - 5 * steps, 100)) for steps in (2, 4, 8))
    drawn = breakdown.by_radius(
        replace(run, models=(run.models[0], replace(model, card=replace(model.card, sweep=sweep))))
    )
    assert drawn.count("<circle") == 3 and drawn.count('class="bar main"') == 3 and "Linf in 255ths" in drawn
    single = replace(model, card=replace(model.card, sweep=sweep[:1]))
    assert breakdown.by_radius(replace(run, models=(run.models[0], single))) == ""
