"""Charts and pictures."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from builders.report_sample import epoch, latency, sample_run
from hypothesis import given
from hypothesis import strategies as st

from robust_prune.report import charts, pictures, svg
from robust_prune.training.types import Start


@given(
    st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 9), st.booleans()
)  # fmt: skip
def test_ticks_cover_their_range_evenly(low: float, width: float, count: int, integer: bool) -> None:
    ticks = svg.nice_ticks(low, low + width, count, integer)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step + 1e-9
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack
    assert 2 <= len(ticks) <= count + 2
    assert all(math.isclose(b - a, step, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairwise(ticks))
    if integer:
        assert all(float(t).is_integer() for t in ticks)


def test_curves_begin_before_the_first_epoch() -> None:
    history = tuple(epoch(e, 1.0) for e in (1, 2))
    drawn = charts.accuracy_curves(history, Start(0.4, 0.2, 500, 10))
    assert drawn.count("<circle") == 6 and drawn.count("epoch 0: ") == 2 and "epoch 0: 20" in drawn
    unscored = [replace(epoch(1, 1.0), val_clean=None, val_robust=None)]
    assert charts.accuracy_curves(unscored, Start(0.4, 0.2, 500, 10)) == ""


def test_tradeoff_needs_two_models_with_both_figures() -> None:
    run = sample_run()
    drawn = charts.tradeoff(run)
    assert drawn.count("<circle") == 2 and "pruned" in drawn
    assert charts.tradeoff(replace(run, models=run.models[:1])) == ""
    bare = replace(run.models[1], card=None, onnx_robust=None)
    assert charts.tradeoff(replace(run, models=(run.models[0], bare))) == ""
    assert charts.speedups(replace(run, models=run.models[:1])) == ""


def test_rows_of_the_speed_chart_name_what_differs() -> None:
    run = sample_run()
    dense, pruned = run.models[:2]
    own = [replace(m, latency=(*m.latency, replace(m.latency[0], kind="defaults", threads=0))) for m in (dense, pruned)]
    names = re.findall(r"<text[^>]*>([^<]*b1[^<]*)<", charts.speedups(replace(run, models=tuple(own))))
    assert len(names) == 2 and len(set(names)) == 2, names


def test_names_in_the_plot_cover_neither_each_other_nor_the_edge() -> None:
    run = sample_run()
    crowd = tuple(
        replace(run.models[1], label=f"a run of some name {i}", latency=(latency("x", 1, 1.93 + 0.01 * i, None),))
        for i in range(6)
    )
    drawn = charts.tradeoff(replace(run, models=(*run.models, *crowd)))
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="name[^>]*>([^<]+)<', drawn)
    assert len(found) == 8
    boxes = []
    for x, y, anchor, name in found:
        width = charts.LETTER * len(name)
        left = float(x) - (width if anchor == "end" else 0)
        assert left + width <= charts.RIGHT + 12 and float(y) > 10
        boxes.append((left, left + width, float(y)))
    for position, (a, b, height) in enumerate(boxes):
        for c, d, other in boxes[:position]:
            assert b <= c or d <= a or abs(height - other) >= 12


def test_the_front_holds_what_no_other_model_beats() -> None:
    assert charts.pareto([(3.0, 0.5), (1.0, 0.3), (2.0, 0.2), (2.5, 0.4), (3.5, 0.5)]) == [1, 3, 0]
    assert charts.pareto([(1.0, 0.3), (1.0, 0.4)]) == [1] and charts.pareto([]) == []


def test_curves_skip_what_is_not_finite() -> None:
    history = tuple(epoch(e, loss, math.nan, math.nan) for e, loss in enumerate((1.0, math.nan, 0.5), start=1))
    assert charts.loss_curve(history).count("<circle") == 2
    assert charts.accuracy_curves(history) == ""
    unscored = [replace(epoch(1, 1.0), val_clean=None, val_robust=None)]
    assert charts.accuracy_curves(unscored) == "" and charts.loss_curve(unscored) != ""
    assert "nan" not in charts.loss_curve(history)
    assert charts.loss_curve(history[:1]).count("<circle") == 1


def test_perturbation_is_grey_where_nothing_changed() -> None:
    image = np.full((3, 4, 4), 100, dtype=np.uint8)
    adversarial = image.astype(np.float32) / 255
    adversarial[0, 0, 0] += 8 / 255
    said = {"dense": {"clean": "cat", "adversarial": "dog"}}
    strip = pictures.strips([{"image": image, "adversarial": adversarial, "label": "cat", "predictions": said}])[0]
    assert strip.amplification == pytest.approx(255 / 16, rel=1e-3)
    assert (strip.verdicts[0].clean_right, strip.verdicts[0].adversarial_right) == (True, False)
    grey = image[:1].astype(np.float32) / 255
    same = pictures.strips([{"image": image[:1], "adversarial": grey, "label": "cat", "predictions": said}])[0]
    assert same.original.startswith("data:image/png;base64,")
