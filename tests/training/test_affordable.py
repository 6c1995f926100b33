"""Training is as long as the time allows."""

from __future__ import annotations

import pytest
import torch

from robust_prune.attacks import ThreatModel
from robust_prune.data.base import TensorImages
from robust_prune.recipe import TrainSettings
from robust_prune.training import affordable
from robust_prune.training.trainer import train as real_train


def test_training_is_as_long_as_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    images = TensorImages(torch.randint(0, 255, (100, 3, 8, 8), dtype=torch.uint8), torch.arange(100) % 3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    seen = []

    def timed(model, few, *args, **kwargs):
        seen.append(len(few))
        result = real_train(model, few, *args, **kwargs)
        # A second for eighty images, whatever this machine takes.
        record = result.history[0].__class__(**{**vars(result.history[0]), "seconds": 1.0})
        return result.__class__((record,), result.best_epoch)

    monkeypatch.setattr(affordable, "train", timed)
    settings = TrainSettings(loss="clean", batch_size=4, precision="fp32")
    threat, weights = ThreatModel("linf", 0.1), [p.clone() for p in model.parameters()]
    assert [affordable.affordable(model, images, threat, settings, s) for s in (1.0, 5.0, 0.001)] == [
        (1, 80),
        (4, 100),
        (1, 4),
    ]
    assert seen == [80, 80, 80]
    assert all(torch.equal(before, now) for before, now in zip(weights, model.parameters(), strict=True))
