"""What happens between the dense model and the recovered one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import QUICK, write_data, write_model

from robust_prune import shrink
from robust_prune.commands.common import open_data, open_model_for, resolve
from robust_prune.runs.files import RunDir
from robust_prune.runs.job import Job, StageLog


class Forbidden:
    """A test split that must not be looked at; its size may be known."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def get(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the test split was read")


@pytest.mark.parametrize("of", ["macs", "latency"])
def test_nothing_is_measured_chosen_or_trained_on_test_images(tmp_path, monkeypatch, of):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)
    flags = {"data.name": "toy.npz", "finetune.epochs": 1, "pruning.of": of, "pruning.steps": 2}
    recipe = resolve(None, flags, QUICK[1::2], demo=False)
    data = open_data(recipe)
    loaded = open_model_for("weights.pt", data, recipe, "model.py:make_model")
    job = Job("toy", loaded, replace(data, test=Forbidden(len(data.test))), recipe, arch="model.py:make_model")
    done = shrink.shrink(job, StageLog(RunDir(tmp_path / "run"), "key"), tmp_path / "run")
    assert done.plan.macs_after < done.plan.macs_before
    with pytest.raises(AssertionError, match="test split was read"):
        job.data.test.get(torch.arange(1))
