"""Copies of models that keep something of their last pass."""

from __future__ import annotations

import threading

import pytest
import torch
from builders.branches import Plain
from torch import Tensor

from robust_prune.errors import UsageError
from robust_prune.introspect.copies import copied


class Keeps(Plain):
    def between(self, x: Tensor) -> Tensor:
        self.kept = [x]
        return x


def test_kept_features_are_detached_in_the_copy_alone() -> None:
    model = Keeps()
    model(torch.rand(2, 3, 8, 8))
    model.body.eval()
    found = copied(model)
    assert found.kept[0].is_leaf and not model.kept[0].is_leaf
    assert found.training and not found.body.training
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    model = Plain()
    model.body.lock = threading.Lock()
    with pytest.raises(UsageError, match=r"cannot be copied, for what body \(Sequential\) holds: .* Keep such objects"):
        copied(model)
