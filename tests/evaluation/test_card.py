"""Accuracies and their intervals."""

from __future__ import annotations

import math

from robust_prune.evaluation.card import Accuracy


def test_empty_accuracy_has_the_widest_interval() -> None:
    assert math.isnan(Accuracy(0, 0).value)
    assert Accuracy(0, 0).interval == (0.0, 1.0)
