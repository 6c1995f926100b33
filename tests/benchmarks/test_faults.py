"""The short version of `benchmarks/faults.py`: whatever a file holds, it is refused in one line or opens as it was."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from builders.places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import faults


@pytest.mark.parametrize(("kind", "count"), [("recipes", 150), ("artifacts", 60), ("results", 25)])
def test_changed_files_are_refused_in_one_line_or_open_as_they_were(tmp_path: Path, kind: str, count: int) -> None:
    files, rng = faults.KINDS[kind](tmp_path), random.Random(1)
    found = Counter(faults.tried(files, rng) for _ in range(count))
    assert found.keys() <= {"refused", "opened"}, found
    assert found["refused"] > count / 3


def test_what_the_counts_would_show(tmp_path: Path) -> None:
    """A traceback and other weights are told from a refusal."""

    class Broken(faults.Recipes):
        outcomes = iter([ZeroDivisionError("bug"), False])

        def open(self) -> bool:
            outcome = next(self.outcomes)
            if isinstance(outcome, Exception):
                raise outcome
            return bool(outcome)

    broken, rng = Broken(tmp_path), random.Random(0)
    assert faults.tried(broken, rng).startswith("traceback: ZeroDivisionError in test_faults.py")
    assert faults.tried(broken, rng) == "opened with other contents"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("killed", 4), ("damaged", 8), ("changed", 4), ("starved", 4), ("shared", 1)]
)
def test_disturbed_runs_end_as_if_nothing_had_happened(tmp_path: Path, kind: str, count: int) -> None:
    runs, rng = faults.KINDS[kind](tmp_path), random.Random(1)
    found = Counter(faults.tried(runs, rng) for _ in range(count))
    assert found.keys() <= {"refused", "opened"}, found
    assert found["refused" if kind == "changed" else "opened"], found
