"""Two processes make one run, and only one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.toy import QUICK, write_data, write_model


def _torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "robust_prune", *arguments],
        cwd=folder, capture_output=True, text=True, check=False, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_compress_in_two_processes_is_one_run(tmp_path: Path) -> None:
    data = write_data(tmp_path / "toy.npz")
    code, weights = write_model(tmp_path)
    command = ["compress", str(weights), "--arch", f"{code}:make_model", "--data", str(data), "--ratio", "0.5",
               "--epochs", "2", "--out", "run", "--tier", "apgd", *QUICK]  # fmt: skip
    done = _torchrun(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Robust acc.") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["command"].startswith("torchrun --nproc-per-node 2 -m robust_prune compress")
    stored = (tmp_path / "run" / "finetune" / "stage.json").read_bytes()
    # One process finds all stages done: how many made them is no part of their identity.
    alone = subprocess.run(
        [sys.executable, "-m", "robust_prune", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert "Training" not in alone.stdout
    assert (tmp_path / "run" / "finetune" / "stage.json").read_bytes() == stored
    for row in result["models"]:
        card = row["card"]
        assert 0 < card["robust"]["correct"] <= card["clean"]["correct"] <= card["clean"]["total"] == 60
        assert card["breakdown"]["apgd-ce"] >= card["robust"]["correct"]


@pytest.mark.slow
def test_a_mistake_in_two_processes_is_named(tmp_path: Path) -> None:
    done = _torchrun(tmp_path, "compress", "missing.pt", "--data", "sample")
    assert done.returncode != 0
    assert "error: model file missing.pt does not exist" in done.stderr
