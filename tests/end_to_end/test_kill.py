"""SIGKILL at random moments: the resumed run ends with the very bits of one that was never killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders.places import TESTS

KILLS = 20
SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[3])
from builders.training_sample import THREAT, make_images, make_model, make_settings
from robust_prune.training import trainer
from robust_prune.training.trainer import train
trainer.CHECKPOINT_SECONDS = 0
torch.set_num_threads(1)
model = make_model()
settings = make_settings(epochs=30, precision="fp32", loss="pgd_at", awp=0.005, awp_warmup=0.5)
train(model, make_images(96), make_images(30, 1), THREAT, settings, checkpoint=Path(sys.argv[1]))
torch.save(model.state_dict(), sys.argv[2])
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, folder / "checkpoint.pt", folder / "weights.pt", TESTS]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_bits(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    process = start(whole)
    wait_for(whole / "checkpoint.pt", process)
    begin = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - begin
    expected = torch.load(whole / "weights.pt")
    moments, killed = random.Random(0), 0
    for number in range(3 * KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start(folder)
        wait_for(folder / "checkpoint.pt", process)
        moment = moments.uniform(0, seconds)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            seconds = moment  # it had ended by then, the machine is faster than it was
            continue
        killed += 1
        assert start(folder).wait() == 0
        found = torch.load(folder / "weights.pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"kill {number} changed the outcome"
        if killed == KILLS:
            return
    raise AssertionError(f"only {killed} kills came before the end")
