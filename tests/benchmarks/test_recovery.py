"""The statistics of the recovery benchmarks, on outcomes whose answer is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from builders.places import BENCHMARKS

from robust_prune.recipe import TrainSettings
from robust_prune.training import trainer

sys.path.insert(0, str(BENCHMARKS))

import recovered
import recovery
import recovery_settings


def _row(seed: int, right: np.ndarray, **more: object) -> dict[str, object]:
    bits = np.packbits(right.astype(bool)).tobytes().hex()
    return {"seed": seed, "test": {"images": len(right), "clean": bits, "robust": bits}, **more}


def test_the_interval_covers_the_spread_of_seeds_as_well_as_of_images() -> None:
    generator = np.random.default_rng(1)
    images = generator.random((1, 1000)) < 0.5
    alike = np.repeat(images, 3, 0).astype(float)
    apart = np.stack([np.full(1000, share) for share in (0.4, 0.5, 0.6)])
    low, high = recovered.interval(alike)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(1000), rel=0.1)
    low, high = recovered.interval(apart)
    assert low <= 0.42 and high >= 0.58


def test_differences_are_paired_by_seed_and_image() -> None:
    generator = np.random.default_rng(0)
    theirs = {seed: (generator.random(2000) < 0.4).astype(float) for seed in (0, 1, 2)}
    mine = {seed: np.maximum(right, np.arange(2000) % 20 == 0) for seed, right in theirs.items() if seed}
    text = recovered.difference(mine, theirs)
    value, low, high = (float(part.strip("[],")) for part in text.split())
    assert 1.5 < low < value < high < 4.5
    assert recovered.difference({5: theirs[0]}, theirs) == ""


def test_the_curve_has_a_column_a_budget_and_differences_to_the_default() -> None:
    right, wrong = np.ones(80), np.zeros(80)
    rows = [_row(s, right if n == "default" else wrong, name=n, minutes=m) for s in (0, 1) for m in (0.5, 2.0)
            for n in ("default", "from scratch")]  # fmt: skip
    result = {
        "arch": "cifar/resnet20", "data": "cifar10", "environment": {"cpu": "a", "device": "cpu"},
        "curve": {"threads": 1, "train_images": 10, "ratio": 0.75, "rows": rows},
    }  # fmt: skip
    lines = recovery.curve_table(result).splitlines()
    assert "| | 0.5 min | 2 min |" in lines
    assert "| from scratch | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] |" in lines
    assert "| | -100.0 [-100.0, -100.0] | -100.0 [-100.0, -100.0] |" in lines


def test_the_former_default_alone_is_trained_on_the_former_schedule() -> None:
    settings = TrainSettings(lr=0.02, warmup=0.2)
    ends = {}
    for name in recovery.CURVE:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
        with recovery.schedule_of(name):
            schedule = trainer.make_schedule(optimizer, settings, 1000)
        schedule.step_update(999)
        ends[name] = optimizer.param_groups[0]["lr"] / 0.02
    assert ends.pop(recovery.FORMER) > 0.05
    assert max(ends.values()) < 1e-4


def test_one_setting_at_a_time_is_moved_from_the_centre() -> None:
    ways = recovery_settings.tunings(["lr", "repair"])
    assert ways["centre"] == ("least_squares", recovery_settings.CENTRE)
    for name, (repair, settings) in ways.items():
        moved = {key for key, value in settings.items() if value != recovery_settings.CENTRE[key]}
        assert len(moved) + (repair != "least_squares") == (name != "centre")
