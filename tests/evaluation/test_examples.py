"""Attacked images for the report."""

from __future__ import annotations

import numpy as np
import torch
from builders.evaluation_sample import (
    THREAT,
    Tiny,
)

from robust_prune.data.base import TensorImages
from robust_prune.evaluation.examples import make_examples


def test_examples_show_every_model_the_same_points(trained: Tiny, images: TensorImages) -> None:
    torch.manual_seed(5)
    models = {"dense": trained, "pruned": Tiny().eval()}
    shown = make_examples(models, images, THREAT, ["red", "green", "blue"], attacked="pruned", count=4)
    assert {e["label"] for e in shown[:3]} == {"red", "green", "blue"} and len(shown) == 4
    for example in shown:
        gap = np.abs(example["adversarial"] - example["image"].astype(np.float32) / 255).max()
        assert 0 < gap <= THREAT.epsilon + 1e-6
        assert set(example["predictions"]) == {"dense", "pruned"}
        assert {p[k] for p in example["predictions"].values() for k in p} <= {"red", "green", "blue"}
