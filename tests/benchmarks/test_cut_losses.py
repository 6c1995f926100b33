"""The table of allocations by the loss of real cuts, at equal MACs and at equal latency."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from builders.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import cut_losses


def row(arm: str, seed: int, right: int, **more: Any) -> dict[str, Any]:
    """Return a row in which the first `right` of 1,000 images survive."""
    robust = np.packbits(np.arange(1000) < right).tobytes().hex()
    return {
        "seed": seed, "ratio": 0.75, "steps": 100, "arm": arm,
        "score": {"images": 1000, "clean": robust, "robust": robust},
        "environment": {"cpu": "a processor", "commit": "0123456789"}, **more,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], **more: Any) -> str:
    return cut_losses.table({"arch": "cifar/resnet20_x2", "data": "cifar10", "rows": rows, **more})


def test_arms_are_compared_with_mrs_over_the_seeds_that_both_have() -> None:
    rows = [row("mrs", 0, 400), row("mrs", 1, 400), row("mrs", 2, 100), row("cuts", 0, 450), row("cuts", 1, 450)]
    text = table(rows, metric="macs")
    assert "| MACs removed | steps |" in text
    line = text.splitlines()[6].split(" | ")
    assert line[:2] == ["| 75 %", "100"]
    assert line[2].startswith("30.0 [") and line[2].endswith("], 3 seeds")
    assert line[5].startswith("45.0 [") and "+5.0 [" in line[5] and line[5].endswith("], 2 seeds")
    assert line[3] == line[4] == "–" and line[6] == "– |"


def test_rows_of_equal_latency_say_what_they_keep_and_lack() -> None:
    rows = [
        row("cuts", 0, 400, latency_kept=0.251, branches=[]),
        row("cuts, branches", 0, 410, latency_kept=0.248, branches=["layer1.1.conv1", "layer2.1.conv1"]),
    ]
    text = table(rows, metric="latency")
    assert "| latency removed | steps |" in text
    assert "; 25.1 % of the latency, 0 branches removed" in text and "; 24.8 % of the latency, 2 branches" in text
