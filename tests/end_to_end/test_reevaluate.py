"""Finished runs whose attacks differ, in one report after all their models were attacked anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders.commands import compress, fails
from builders.toy import QUICK, write_data, write_model

from robust_prune import cli
from robust_prune.evaluation import kept
from robust_prune.report.compare import load_run


def robust(folder: Path) -> dict[str, list[int]]:
    """Images that each model and each of its files classifies correctly under attack, by label."""
    return {
        row.label: [found.correct for found in (row.card and row.card.robust, row.onnx_robust) if found]
        for row in load_run(folder).models
    }


def test_runs_with_other_attacks_share_a_table_once_they_are_attacked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)
    scratch = ["--baseline", "scratch", "--set", "baseline.minutes=0.01"]
    compress("half", "--precision", "int8", *scratch, "--set", "threat.epsilon=40/255")
    cli.main(
        ["frontier", "weights.pt", "--arch", "model.py:make_model", "--data", "toy.npz", "--ratio", "0.6",
         "--epochs", "1", "--out", "all", *QUICK]
    )  # fmt: skip
    assert "--reevaluate aa-fast" in fails(capsys, "report", "half", "all/60")[1]
    shutil.move("half", "moved")

    arguments = ["--arch", "model.py:make_model", "--reevaluate", "pgd", "--out", "joint"]
    cli.main(["report", "moved", "all", *arguments])
    found = robust(tmp_path / "joint")
    assert list(found) == ["dense", "moved pruned", "moved pruned int8", "moved scratch", "60 pruned"]
    before, easier = robust(tmp_path / "moved"), robust(tmp_path / "all" / "60")
    assert list(found.values())[:4] == list(before.values())
    assert found["dense"] < easier["dense"] and len(found["60 pruned"]) == 2
    result = json.loads((tmp_path / "joint" / "result.json").read_text())
    assert {model["card"]["threat"]["epsilon"] for model in result["models"] if model["card"]} == {40 / 255}
    assert not list((tmp_path / "joint").glob("*.npz"))

    def recomputed(*_: object, **__: object) -> None:
        raise AssertionError("an evaluation that is in the cache was made again")

    monkeypatch.setattr(kept, "evaluate", recomputed)
    cli.main(["report", "moved", "all", *arguments])
    assert robust(tmp_path / "joint") == found

    shutil.copy("all/60/model.safetensors", "moved/model.safetensors")
    code, said = fails(capsys, "report", "moved", "all", *arguments)
    assert code == 4 and "moved/model.safetensors is not the pruned model that the run evaluated" in said
    (tmp_path / "all" / "60" / "dense.safetensors").unlink()
    assert "all/60/dense.safetensors is not there" in fails(capsys, "report", "all", *arguments)[1]
    assert "is the folder of a run" in fails(capsys, "report", "all/60", "--out", "all")[1]
    assert "tier must be one of" in fails(capsys, "report", "all", *arguments[:2], "--reevaluate", "pgdd")[1]
    assert "Add --reevaluate" in fails(capsys, "report", "all", "--data", "toy.npz")[1]
