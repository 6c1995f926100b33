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


def test_a_package_beside_this_one_adds_choices_but_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from robust_prune import catalogue

    points = [EntryPoint(name, "operator:add", "robust_prune.ranking.criteria") for name in ("theirs", "random")]
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [p for p in points if p.group == group])
    criteria = catalogue.Catalogue("criterion", "ranking.criteria", "score")
    assert criteria.load("theirs") is operator.add and criteria.check("theirs") == "theirs"
    assert "theirs" in criteria.help() and criteria.load("random") is not operator.add
    assert "theirs" not in catalogue.Catalogue("loss", "training.loss_functions", "loss").names


def test_one_file_more_is_one_criterion_more(tmp_path: Path) -> None:
    """In help, in recipes and in the contract test, which a bad criterion fails."""
    shutil.copytree(ROOT / "robust_prune", tmp_path / "robust_prune", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    toy = tmp_path / "robust_prune" / "ranking" / "criteria" / "toy.py"
    body = '"""A toy."""\nimport torch\n\n\ndef score(asked):\n'
    body += "    return {g.name: torch.%s(g.channels) for g in asked.groups}\n"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path)

    toy.write_text(body % "ones")
    assert "toy" in run("-m", "robust_prune", "compress", "--help").stdout
    contract = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "ranking" / "test_importance.py"),
        "-k",
        "toy",
    )
    passed = run(*contract)
    assert "1 passed" in passed.stdout, passed.stdout + passed.stderr
    toy.write_text(body % "zeros")
    assert "1 failed" in run(*contract).stdout
