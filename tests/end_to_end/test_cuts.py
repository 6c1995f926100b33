"""Whole runs whose plans rest on the loss of real cuts and may take branches out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders.branch_models import Residuals, images
from builders.toy import QUICK, write_data

import robust_prune as rp
from robust_prune import cli
from robust_prune.budget import cut_losses

MODEL = """
from builders.branch_models import Residuals

def make_model():
    return Residuals(3)
"""


@pytest.fixture(autouse=True)
def cheap_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of cuts of a net that has learned nothing are noise, so those of branches are said to be small."""

    def said(keep: int, each: torch.Tensor) -> cut_losses.CutLoss:
        assert torch.isfinite(each).all()
        return cut_losses.CutLoss(keep, 1 / keep if keep else 1e-3, 1e-4)

    monkeypatch.setattr(cut_losses, "_cut_loss", said)
    monkeypatch.setattr(cut_losses, "IMAGES", 16)
    monkeypatch.setattr(cut_losses, "GRAM_IMAGES", 32)


@pytest.mark.parametrize("cuts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_takes_branches_out_and_its_files_are_those_of_the_smaller_model(
    cuts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data.npz")
    (tmp_path / "model.py").write_text(MODEL)
    torch.manual_seed(0)
    torch.save(Residuals(3).state_dict(), tmp_path / "weights.pt")
    out = tmp_path / "run"
    command = [
        "compress", str(tmp_path / "weights.pt"), "--arch", f"{tmp_path / 'model.py'}:make_model", "--data", str(data),
        "--ratio", "0.6", "--allocation", "cuts", "--cuts", str(cuts), "--epochs", "1", "--baseline", "scratch",
        "--set", "baseline.minutes=0.01", "--set", "pruning.round_to=1", "--out", str(out), *QUICK,
    ]  # fmt: skip
    cli.main(command)
    printed = capsys.readouterr().out
    assert "stayed whole" not in printed
    result = json.loads((out / "result.json").read_text())
    dense, pruned, scratch = result["models"]
    assert pruned["macs"] / dense["macs"] == pytest.approx(0.4, abs=0.03)
    assert scratch["macs"] == pruned["macs"] and scratch["params"] == pruned["params"]
    small = rp.load(out / "model.safetensors", arch=f"{tmp_path / 'model.py'}:make_model")
    names = {name for name, _ in small.module.named_parameters()}
    gone = [i for i in range(3) if not any(name.endswith(f"blocks.{i}.conv1.weight") for name in names)]
    assert gone and all(any(name.endswith(f"blocks.{i}.branch_constant") for name in names) for i in gone)
    nodes = [node.op_type for node in onnx.load(out / "model.onnx").graph.node]
    assert nodes.count("Conv") == 8 - 2 * len(gone)
    cli.main(command)
    assert "Already done" in capsys.readouterr().out
    cli.main(["verify", str(out), "--arch", f"{tmp_path / 'model.py'}:make_model"])


def test_step_by_step_from_python(tmp_path: Path) -> None:
    data = rp.load_data(str(write_data(tmp_path / "data.npz")))
    torch.manual_seed(0)
    model = rp.load(Residuals(3), data=data)
    settings = {"sensitivity__images": 32, "sensitivity__steps": 2, "pruning__allocation": "cuts"}
    analysis = rp.analyse(model, data, **settings)
    plan = rp.plan(analysis, ratio=0.6, allocation="cuts", round_to=1)
    assert any(group.keep == 0 for group in plan.groups)
    assert all(group.keep for group in rp.plan(analysis, ratio=0.6, allocation="cuts", branches=False).groups)
    small = rp.prune(model, plan, data, pruning__repair_images=32)
    dense, pruned = (sum(p.numel() for p in m.module.parameters()) for m in (model, small))
    assert pruned < 0.8 * dense
    rp.export(small, tmp_path / "small.onnx", data)
    assert np.isfinite(small.module(images(16)).detach().numpy()).all()
