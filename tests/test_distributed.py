"""Two gloo processes train what one trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import THREAT, _images, _settings
from torch import nn

from robust_prune.training.trainer import train

SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_distributed import run
model = run(sys.argv[3])
if torch.distributed.get_rank() == 0:
    torch.save(model.state_dict(), sys.argv[1])
assert torch.distributed.get_world_size() == 2
torch.distributed.destroy_process_group()
"""


def plain_model() -> nn.Module:
    """Without batch-norm, whose statistics depend on how a batch is divided."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def run(loss: str) -> nn.Module:
    torch.set_num_threads(1)
    model = plain_model()
    settings = _settings(loss=loss, epochs=4, precision="fp32", lr=0.1, distillation=0.0)
    train(model, _images(96), _images(30, 1), THREAT, settings)
    return model


def in_two_processes(folder: Path, loss: str) -> dict[str, torch.Tensor]:
    script, weights = folder / "script.py", folder / "weights.pt"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script, weights, Path(__file__).parent, loss],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, torch.Tensor] = torch.load(weights)
    return found


@pytest.mark.parametrize("loss", ["clean", "n_fgsm", "trades"])
def test_two_processes_equal_one_on_a_model_without_batch_norm(tmp_path: Path, loss: str) -> None:
    """With random crops and attacks: both are those that one process draws."""
    found, alone = in_two_processes(tmp_path, loss), run(loss).state_dict()
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name
