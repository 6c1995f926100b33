"""Masked channels, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.surgery_models import (
    Mlp,
    images,
)
from builders.weights import randomised
from torch import nn

from robust_prune.structure.masking import masked


def test_masking_is_undone_bit_for_bit() -> None:
    model = randomised(Mlp(24))
    before, logits = copy.deepcopy(model.state_dict()), model(images())
    with masked(model, {("embed", "out", 0): {1, 2}, ("norm", "norm", 0): {1, 2}, ("fc1", "in", 0): {1, 2}}):
        assert not torch.allclose(model(images()), logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(images()), logits)


@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (False, 2), (False, 4), (True, 1)])
def test_what_a_reader_is_told_to_forget_it_no_longer_sees(transposed: bool, groups: int) -> None:
    """As if its inputs were zero, whatever they are: an activation may make something of nothing."""
    torch.manual_seed(0)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 12, 3, padding=1, groups=groups)
    model = nn.Sequential(layer)
    x = torch.rand(2, 8, 5, 5)
    blank = x.clone()
    blank[:, [1, 6]] = 0
    with torch.no_grad():
        wanted, before = model(blank), model(x)
        with masked(model, {("0", "in", 0): {1, 6}}):
            torch.testing.assert_close(model(x), wanted)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_writer_is_told_to_leave_out_is_zero(transposed: bool) -> None:
    model = nn.Sequential((nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 6, 3))
    with torch.no_grad(), masked(model, {("0", "out", 0): {2, 3}}):
        gone = model(torch.rand(2, 3, 5, 5)).abs().sum((0, 2, 3)) == 0
    assert gone.tolist() == [False, False, True, True, False, False]
