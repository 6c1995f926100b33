"""Masked channels, and back."""

from __future__ import annotations

import copy

import torch
from builders.surgery_models import (
    Mlp,
    images,
)
from builders.weights import randomised

from robust_prune.structure.masking import masked


def test_masking_is_undone_bit_for_bit() -> None:
    model = randomised(Mlp(24))
    before, logits = copy.deepcopy(model.state_dict()), model(images())
    with masked(model, {("embed", "out", 0): {1, 2}, ("norm", "norm", 0): {1, 2}, ("fc1", "in", 0): {1, 2}}):
        assert not torch.allclose(model(images()), logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(images()), logits)
