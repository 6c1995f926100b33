"""The controls and statistics of the comparison of criteria."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from builders.places import BENCHMARKS

from robust_prune.attacks import ThreatModel
from robust_prune.sensitivity.profile import GroupSensitivity, ModuleSensitivity, SensitivityProfile

sys.path.insert(0, str(BENCHMARKS))

import criteria
import criteria_table


def row(name: str, seed: int, right: np.ndarray, commit: str = "abc") -> dict[str, Any]:
    bits = np.packbits(right.astype(bool)).tobytes().hex()
    after = {"robust": {"total": len(right), "correct": int(right.sum())}, "robust_bits": bits}
    return {"name": name, "seed": seed, "ratio": 0.75, "commit": commit, "after": after}


def test_arms_that_are_not_told_apart_are_marked() -> None:
    generator = np.random.default_rng(0)
    base = [generator.random(800) < 0.4 for _ in range(3)]
    mrs = [row("mrs", seed, right) for seed, right in enumerate(base)]
    far = [row("far", seed, right & (generator.random(800) < 0.5)) for seed, right in enumerate(base)]
    near = [row("near", seed, right ^ (generator.random(800) < 0.02)) for seed, right in enumerate(base)]
    shown = criteria_table._summary([*mrs, *far, *near], ["mrs", "far", "near"])
    lines = {line.split("|")[1].strip(): line for line in shown if line.startswith("|")}
    assert lines["near"].rstrip(" |").endswith("=") and not lines["far"].rstrip(" |").endswith("=")


def test_seeds_that_differ_widen_the_interval() -> None:
    half = np.arange(1000) < 500
    alike = [row("x", seed, half) for seed in range(3)]
    apart = [row("x", seed, np.arange(1000) < count) for seed, count in enumerate((300, 500, 700))]

    def width(rows: list[dict[str, Any]]) -> float:
        low, high = criteria_table.interval(criteria_table.outcomes(rows, "robust"))
        return high - low

    assert width(apart) > 3 * width(alike)


def test_the_table_says_of_which_commits_its_rows_are() -> None:
    right = np.ones(8)
    one = [row("mrs", 0, right), row("rank", 0, right)]
    assert criteria_table.commits(one) == "All rows are of commit abc.\n"
    assert criteria_table.commits([*one, row("rank", 1, right, "def")]) == "Commits: abc: mrs, rank; def: rank.\n"
    assert "without the commit" in criteria_table.commits([*one, row("rank", 1, right, "")])


@pytest.fixture
def analysis() -> Any:
    from types import SimpleNamespace

    modules = tuple(ModuleSensitivity(f"m{i}", "conv", float(i), 1.0, (float(i), 2.0 * i)) for i in range(1, 9))
    groups = tuple(GroupSensitivity(f"m{i}", float(i), (float(i), 2.0 * i)) for i in range(1, 9))
    profile = SensitivityProfile(
        "boundary", 0.1, (0.1, 0.2), "sum", 1.0, 8, 0, ThreatModel("linf", 8 / 255), modules, groups
    )
    search = SimpleNamespace(groups=[SimpleNamespace(name=f"m{i}", producers=(f"m{i}",)) for i in range(1, 9)])
    return SimpleNamespace(profile=profile, search=search)


def test_controls_take_the_sensitivities_out(analysis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "replace", lambda value, **changes: _replaced(value, changes))
    measured = criteria.with_sensitivities(analysis, "measured", 0)
    shuffled = criteria.with_sensitivities(analysis, "shuffled", 0).profile.groups
    equal = criteria.with_sensitivities(analysis, "equal", 0).profile.groups
    assert measured is analysis
    assert sorted(g.mrs for g in shuffled) == [float(i) for i in range(1, 9)]
    assert [g.mrs for g in shuffled] != [float(i) for i in range(1, 9)]
    assert all(g.curve == (g.mrs, 2 * g.mrs) for g in shuffled), "curves move with their values"
    assert len({g.mrs for g in equal}) == 1


def test_equal_sensitivities_are_equal_for_groups_of_any_number_of_layers(
    analysis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(criteria, "replace", lambda value, **changes: _replaced(value, changes))
    names = [module.name for module in analysis.profile.modules]
    sizes = (1, 3, 4)
    ends = np.cumsum(sizes)
    groups = [
        SimpleNamespace(name=names[end - size], producers=tuple(names[end - size : end]))
        for size, end in zip(sizes, ends, strict=True)
    ]
    for first in np.random.default_rng(0).random(50):
        modules = tuple(_replaced(module, {"mrs": float(first)}) for module in analysis.profile.modules)
        profile = _replaced(analysis.profile, {"modules": modules})
        one = SimpleNamespace(profile=profile, search=SimpleNamespace(groups=groups))
        assert len({g.mrs for g in criteria.with_sensitivities(one, "equal", 0).profile.groups}) == 1


def _replaced(value: Any, changes: dict[str, Any]) -> Any:
    from dataclasses import is_dataclass, replace
    from types import SimpleNamespace

    return replace(value, **changes) if is_dataclass(value) else SimpleNamespace(**{**vars(value), **changes})
