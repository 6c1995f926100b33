"""The table of the headline counts what has been measured so far, and compares models on the same images."""

from __future__ import annotations

import sys

import numpy as np
from builders.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import headline


def part(robust: int) -> dict[str, object]:
    """Return the figures of a thousand images, of which the first `robust` survive."""
    survives = np.arange(headline.AT_ONCE) < robust
    return {
        "clean": 800, "robust": robust, "after_all": np.packbits(survives).tobytes().hex(), "flags": [],
        "processor_seconds": 1800.0, "environment": {"cpu": "a processor", "commit": "0123456789"},
    }  # fmt: skip


def test_models_are_compared_on_the_images_that_both_have() -> None:
    text = headline.table({"models": {"dense": [part(400), part(420)], "half": [part(390)]}})
    assert "| dense | 2,000 | 80.0 [78.2, 81.7] | 41.0 [38.9, 43.2] | – |" in text
    assert "| half | 1,000 | 80.0 [77.4, 82.4] | 39.0 [36.0, 42.1] | -1.0 [-1.6, -0.4] |" in text
    assert "Measured on a processor, commit 0123456: 1.5 processor hours. Alarms: none." in text
