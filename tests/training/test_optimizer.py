"""The learning rate over a run, and what of a model is decayed."""

from __future__ import annotations

import math

import pytest
from builders.training_sample import THREAT, make_images, make_model, make_settings

from robust_prune.recipe import TrainSettings
from robust_prune.training.optimizer import decay_groups, peak_rate
from robust_prune.training.trainer import train


def test_the_learning_rate_falls_along_a_cosine_from_the_end_of_the_warm_up_to_zero_at_the_end_of_the_run():
    images = make_images(64)  # 4 steps an epoch, 20 in all, 5 of them warm-up
    history = train(
        make_model(), images, make_images(30, 1), THREAT, make_settings(epochs=5, warmup=0.25, lr=0.2)
    ).history
    done = [(4 * (epoch + 1) - 1 - 5) / 15 for epoch in range(1, 5)]
    assert [record.lr for record in history[1:]] == pytest.approx([0.1 * (1 + math.cos(math.pi * d)) for d in done])
    assert history[-1].lr < 0.003


def test_a_short_run_takes_a_lower_peak_rate_unless_it_is_told_one():
    assert [peak_rate(TrainSettings(), steps) for steps in (150, 600, 9000)] == pytest.approx([0.05, 0.1, 0.1])
    assert peak_rate(TrainSettings(lr=0.3), 150) == 0.3
    images = make_images(64)  # 4 steps an epoch, the last of 8 at a fraction of the peak
    rates = [train(make_model(), images, make_images(30, 1), THREAT, make_settings(epochs=2, lr=lr)).history[-1].lr
             for lr in (None, 0.1 * math.sqrt(8 / 600))]  # fmt: skip
    assert rates[0] == rates[1] > 0


def test_norms_and_biases_are_not_decayed():
    decayed, plain = decay_groups(make_model(), 0.1)
    assert {p.ndim for p in decayed["params"]} == {2, 4} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in plain["params"]} == {1} and plain["weight_decay"] == 0.0
