"""The score that epochs are chosen by."""

from __future__ import annotations

import torch
from builders.training_sample import THREAT, make_images, make_model

from robust_prune.data.base import TensorImages
from robust_prune.training import trainer
from robust_prune.training.validation import score


def test_logits_that_are_not_finite_are_never_right():
    model = make_model()
    with torch.no_grad():
        model[5].bias.fill_(float("nan"))
    images = TensorImages(make_images(30).images, torch.zeros(30, dtype=torch.long))
    precision = trainer.Precision(bf16=False, channels_last=False)
    found = score(model, images, THREAT, steps=1, seed=0, device=torch.device("cpu"), precision=precision)
    assert found == (0.0, 0.0)
