"""Two gloo processes learn what one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.places import TESTS
from builders.training_sample import THREAT, make_images, make_model
from builders.two_processes import run, run_counted

from robust_prune.attacks import pgd

LOSSES = ("n_fgsm", "trades")
SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from builders.two_processes import run, run_counted
states = {loss: run(loss, sys.argv[3]).state_dict() for loss in sys.argv[4:]}
counts = [torch.zeros(1) for _ in range(2)]
torch.distributed.all_gather(counts, torch.tensor([float(run_counted())]))
states["counts"] = {str(rank): count for rank, count in enumerate(counts)}
if torch.distributed.get_rank() == 0:
    torch.save(states, sys.argv[1])
assert torch.distributed.get_world_size() == 2
from robust_prune import distributed
distributed.leave_group()
"""


def in_two_processes(folder: Path, *losses: str, kind: str = "plain") -> dict[str, dict[str, torch.Tensor]]:
    """The weights that two processes end with, by loss."""
    script, weights = folder / "script.py", folder / "weights.pt"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script, weights, TESTS, kind, *losses],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, torch.Tensor]] = torch.load(weights)
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    return in_two_processes(tmp_path_factory.mktemp("two"), *LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_equal_one_on_a_model_without_batch_norm(
    together: dict[str, dict[str, torch.Tensor]], loss: str
) -> None:
    """Random crops and starts of attacks are those that one process draws."""
    found, alone = together[loss], run(loss).state_dict()
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_each_of_two_processes_reads_half_of_the_images(together: dict[str, dict[str, torch.Tensor]]) -> None:
    assert run_counted() == 2 * 96
    assert [together["counts"][rank].item() for rank in ("0", "1")] == [96, 96]


@pytest.mark.slow
def test_two_processes_train_a_model_with_batch_norm_as_robustly(tmp_path: Path) -> None:
    """Each normalises with its own share of a batch, so that weights differ; what is learned does not."""
    model = make_model()
    model.load_state_dict(in_two_processes(tmp_path, "pgd_at", kind="batch-norm")["pgd_at"])
    images = make_images(300, 3)
    found = {"two": model.eval(), "one": run("pgd_at", "batch-norm").eval()}
    x, y = images.images.float() / 255, images.labels
    right = {}
    for name, trained in found.items():
        x_adv = pgd(trained, x, y, THREAT, steps=10, generator=torch.Generator().manual_seed(0))
        right[name] = int((trained(x_adv).argmax(1) == y).sum())
    assert abs(right["two"] - right["one"]) <= 0.06 * len(y)  # the 95 % interval of a share of 300 images
    assert right["one"] > 200
