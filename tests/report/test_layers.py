"""The chart of the cut: sensitivity and channels of each group in one row."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from builders.report_sample import sample_run

from robust_prune.budget.types import PlannedGroup
from robust_prune.report import layers


def test_a_group_has_its_sensitivity_and_its_channels_in_one_row() -> None:
    run = sample_run()
    assert run.plan is not None
    rows = layers.group_rows(run)
    assert [row.name for row in rows] == [group.name for group in run.plan.groups]
    assert [row.mrs for row in rows] == [group.mrs for group in run.plan.groups]
    assert rows[0].after == run.plan.groups[0].keep < (rows[0].before or 0)
    drawn = layers.layers(run)
    assert drawn.count('class="kept"') == drawn.count('class="removed"') == drawn.count("<circle") == len(rows)
    heights = [re.findall(rf'y="([\d.]+)"[^>]*class="{css}"', drawn) for css in ("row", "kept", "removed")]
    assert len({len(found) for found in heights}) == 1 and heights[1] == heights[2]
    assert {float(name) - float(bar) for name, bar in zip(*heights[:2], strict=True)} == {9.0}
    assert f"MRS {rows[0].mrs:.3g} nats" in rows[0].tip and "28 of 32 channels kept (88 %)" in rows[0].tip


def test_sensitivities_stand_on_a_logarithmic_scale() -> None:
    scale = layers.log_scale([0.0, 0.01, 0.1, 1.0, 10.0, 1e-9])
    assert scale is not None
    places = [scale.place(value) for value in (0.0, 0.01, 0.1, 1.0, 10.0, 1e-9)]
    assert places[0] == places[5] == layers.MRS_START and places[4] == layers.MRS_END
    assert places[2] - places[1] == pytest.approx(places[3] - places[2]) == pytest.approx(places[4] - places[3])
    assert layers.log_scale([0.0, float("nan")]) is None


def test_without_a_plan_layers_stand_alone_and_without_anything_there_is_no_chart() -> None:
    run = replace(sample_run(), plan=None)
    assert run.profile is not None
    drawn = layers.layers(run)
    assert drawn.count("<circle") == len(run.profile.modules) and 'class="kept"' not in drawn
    assert layers.layers(replace(run, profile=None)) == ""


def test_groups_whose_sensitivity_was_not_measured_have_bars_only() -> None:
    run = sample_run()
    assert run.plan is not None
    group = PlannedGroup("a.very.long.name.of.some.convolution.in.a.block", 8, (1,), None)
    drawn = layers.layers(replace(run, plan=replace(run.plan, groups=(group, replace(group, name="b")))))
    assert "MRS" not in drawn and drawn.count('class="kept"') == 2
    assert "…" in drawn and "<title>a.very.long.name" in drawn
