"""Two gloo processes do what one does, and only one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import THREAT, _images, _model, _settings
from torch import nn
from toy import QUICK, write_data, write_model

from robust_prune.attacks import pgd
from robust_prune.training.trainer import train

SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_distributed import run
model = run(sys.argv[3], sys.argv[4])
if torch.distributed.get_rank() == 0:
    torch.save(model.state_dict(), sys.argv[1])
assert torch.distributed.get_world_size() == 2
from robust_prune import distributed
distributed.leave_group()
"""


def plain_model() -> nn.Module:
    """Without batch-norm, whose statistics depend on how a batch is divided."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def run(loss: str, kind: str = "plain") -> nn.Module:
    torch.set_num_threads(1)
    model = plain_model() if kind == "plain" else _model()
    settings = _settings(loss=loss, epochs=4, precision="fp32", lr=0.1)
    train(model, _images(96), _images(30, 1), THREAT, settings)
    return model


def in_two_processes(folder: Path, loss: str, kind: str = "plain") -> dict[str, torch.Tensor]:
    script, weights = folder / "script.py", folder / "weights.pt"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script, weights, Path(__file__).parent, loss, kind],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, torch.Tensor] = torch.load(weights)
    return found


@pytest.mark.parametrize("loss", ["n_fgsm", "trades"])
def test_two_processes_equal_one_on_a_model_without_batch_norm(tmp_path: Path, loss: str) -> None:
    """Random crops and starts of attacks are those that one process draws."""
    found, alone = in_two_processes(tmp_path, loss), run(loss).state_dict()
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_two_processes_train_a_model_with_batch_norm_as_robustly(tmp_path: Path) -> None:
    """Each normalises with its own share of a batch, so that weights differ; what is learned does not."""
    model = _model()
    model.load_state_dict(in_two_processes(tmp_path, "pgd_at", "batch-norm"))
    images = _images(300, 3)
    found = {"two": model.eval(), "one": run("pgd_at", "batch-norm").eval()}
    x, y = images.images.float() / 255, images.labels
    right = {}
    for name, trained in found.items():
        x_adv = pgd(trained, x, y, THREAT, steps=10, generator=torch.Generator().manual_seed(0))
        right[name] = int((trained(x_adv).argmax(1) == y).sum())
    assert abs(right["two"] - right["one"]) <= 0.06 * len(y)  # the 95 % interval of a share of 300 images
    assert right["one"] > 200


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
