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
