"""Named choices: files, packages beside this one, and users' files."""

from __future__ import annotations

import operator
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from builders.places import ROOT

from robust_prune.errors import UsageError


def test_a_package_beside_this_one_adds_choices_but_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from robust_prune import catalogue

    points = [EntryPoint(name, "operator:add", "robust_prune.ranking.criteria") for name in ("theirs", "random")]
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [p for p in points if p.group == group])
    criteria = catalogue.Catalogue("criterion", "ranking.criteria", "score")
    assert criteria.load("theirs") is operator.add and criteria.check("theirs") == "theirs"
    assert "theirs" in criteria.help() and criteria.load("random") is not operator.add
    assert criteria.names[-1] == "theirs" and list(criteria.names[:-1]) == sorted(criteria.names[:-1])
    assert criteria.choices["theirs"] == "from operator:add" and "operator" not in criteria.choices["random"]
    assert "theirs" not in catalogue.Catalogue("loss", "training.loss_functions", "loss").names


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no_such_package_here:f", r"criterion 'theirs' of .* cannot be imported: ModuleNotFoundError"),
        ("operator:no_such_function", "cannot be imported: AttributeError"),
        ("math:pi", "is not a function"),
    ],
)
def test_a_package_that_fails_to_import_is_named(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    from robust_prune import catalogue
    from robust_prune.commands import common

    point = EntryPoint("theirs", value, "robust_prune.ranking.criteria")
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [point] if group == point.group else [])
    criteria = catalogue.Catalogue("criterion", "ranking.criteria", "score")
    monkeypatch.setattr(common, "CATALOGUES", (criteria,))
    with pytest.raises(UsageError, match=words):
        criteria.load("theirs")
    with pytest.raises(UsageError, match=words):
        common.check_functions("magnitude", "theirs")


def test_a_choice_is_named_after_its_file_and_described_by_its_first_line() -> None:
    from robust_prune.catalogue import ALLOCATIONS, CRITERIA, TIERS

    assert "aa-fast" in TIERS.names and "global" in ALLOCATIONS.names and "adversarial_taylor" in CRITERIA.names
    assert not any("__init__" in name for name in (*TIERS.names, *ALLOCATIONS.names, *CRITERIA.names))
    for line in (*TIERS.choices.values(), *ALLOCATIONS.choices.values(), *CRITERIA.choices.values()):
        assert line and "\n" not in line and not line.endswith(".")
    with pytest.raises(ValueError, match=r"must be one of .*uniform, or file\.py:function"):
        ALLOCATIONS.check("best")
    assert ALLOCATIONS.check("mine.py:best") == "mine.py:best"
    with pytest.raises(UsageError, match=r"^allocation must be one of .*, got 'best'$"):
        ALLOCATIONS.load("best")


def test_one_file_more_is_one_criterion_more(tmp_path: Path) -> None:
    """In help, in recipes and in the contract test, which a bad criterion fails."""
    shutil.copytree(ROOT / "robust_prune", tmp_path / "robust_prune", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    criteria = tmp_path / "robust_prune" / "ranking" / "criteria"
    body = '"""A toy."""\nimport torch\n\n\ndef score(asked):\n'
    body += "    return {g.name: torch.%s(g.channels) for g in asked.groups}\n"
    (criteria / "toy_good.py").write_text(body % "ones")
    (criteria / "toy_bad.py").write_text(body % "zeros")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        return done.stdout + done.stderr

    assert "toy_good" in run("-m", "robust_prune", "compress", "--help")
    contract = str(ROOT / "tests" / "ranking" / "test_importance.py")
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", contract, "-k", "toy")
    assert "1 failed, 1 passed" in told and "FAILED" in told and "[toy_bad]" in told.split("FAILED")[1], told
