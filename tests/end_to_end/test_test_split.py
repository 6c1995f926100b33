"""Where the main job looks, and where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders.toy import QUICK, write_data, write_model

from robust_prune.commands.common import open_data, open_model_for, resolve
from robust_prune.compression import Compression, compress
from robust_prune.data.base import ImageSet


class Forbidden:
    """A test split that must not be looked at; its size may be known."""

    def __init__(self, images: ImageSet) -> None:
        self._size = len(images)

    def __len__(self) -> int:
        return self._size

    def get(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the test split was read")


@pytest.mark.parametrize("metric", ["macs", "latency"])
def test_nothing_is_measured_chosen_or_trained_on_test_images(tmp_path, monkeypatch, metric):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "toy.npz")
    write_model(tmp_path)
    flags = {"data.name": "toy.npz", "finetune.epochs": 1, "pruning.metric": metric, "pruning.cuts": 2}
    recipe = resolve(None, flags, QUICK[1::2], demo=False)
    data = open_data(recipe)
    loaded = open_model_for("weights.pt", data, recipe, "model.py:make_model")
    data = replace(data, test=Forbidden(data.test))
    job = Compression("toy", loaded, data, recipe, tmp_path / "run")
    monkeypatch.setattr("robust_prune.job.images_hash", lambda images: str(len(images)))
    monkeypatch.setattr("robust_prune.budget.latency_search.MOST_CANDIDATES", 1)
    # The first who reads test images is the evaluation of the finished models, from the files that were exported.
    with pytest.raises(AssertionError, match="test split was read"):
        compress(job)
    assert (tmp_path / "run" / "model.onnx").exists() and (tmp_path / "run" / "export-pruned" / "stage.json").exists()
    assert not (tmp_path / "run" / "evaluate-dense" / "stage.json").exists()
