"""The loss of real cuts."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from builders.places import BENCHMARKS
from torch import nn

from robust_prune.structure.groups import find_groups

sys.path.insert(0, str(BENCHMARKS))

import cut_losses


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_a_cut_is_the_least_squares_fit_of_the_readers_and_is_undone() -> None:
    model, images = small(), torch.rand(64, 3, 8, 8)
    groups = find_groups(model, torch.rand(1, 3, 8, 8), images[:8]).groups
    group = next(g for g in groups if g.name == "0")
    assert set(cut_losses.readers(model, group)) == {"3"}
    grams = cut_losses.gram_matrices(model, {"3"}, images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = model[:3](images)
    wanted = model[3](inputs)
    scores = torch.arange(8.0)
    with cut_losses.cut(model, group, 4, scores, grams):
        assert (model[3].weight[:, :4] == 0).all() and (model[3].weight[:, 4:] != 0).any()
        fitted = (model[3](inputs) - wanted).square().mean()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain = model[3].weight.data.clone()
    model[3].weight.data[:, :4] = 0
    assert fitted < 0.5 * (model[3](inputs) - wanted).square().mean()
    model[3].weight.data = plain


def test_losses_are_convex_pass_through_what_was_measured_and_end_at_zero() -> None:
    group = find_groups(small(), torch.rand(1, 3, 8, 8), torch.rand(8, 3, 8, 8)).groups[0]
    (loss,) = cut_losses.losses_of([group], {group.name: {1: 0.9, 2: 0.3, 4: -0.1}})
    assert len(loss) == group.channels + 1 and loss[-1] == 0 and loss[2] == pytest.approx(0.3)
    assert (np.diff(loss) <= 0).all() and (np.diff(loss, 2) >= -1e-12).all()
