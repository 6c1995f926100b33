"""Figures in words."""

from __future__ import annotations

import pytest

from robust_prune.console import duration
from robust_prune.report import (
    text,
)
from robust_prune.report.html import flatten


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (999, "999"), (512_000, "512 k"), (80_050_000, "80.05 M"), (4.1e9, "4.1 G")]
)
def test_quantities(value: float, shown: str) -> None:
    assert text.quantity(value) == shown


def test_small_figures_of_speech() -> None:
    assert text.file_size(2_110_000) == "2.11 MB"
    assert text.file_size(None) == text.NONE
    assert text.signed(-0.04) == "0" and text.signed(-1.25, 2) == "−1.25"
    assert text.relative(5, 0) == "" and text.relative(None, 4) == "" and text.relative(5, 10) == "−50.0 %"
    assert [duration(s) for s in (1.23, 59.2, 59.7, 252, 7300)] == [
        "1.2 s",
        "59 s",
        "1 min 0 s",
        "4 min 12 s",
        "2 h 1 min",
    ]
    assert text.short_names(["a.b.c", "a.b.d.e"]) == {"a.b.c": "c", "a.b.d.e": "d.e"}
    assert text.short_names(["a.b", "a"]) == {"a.b": "a.b", "a": "a"}
    assert text.moment("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04 UTC" and text.moment("today") == "today"
    assert flatten({"a": {"b": 1, "c": None}, "d": [1, 2], "e": ""}) == [("a: b", "1"), ("d", "1, 2")]
