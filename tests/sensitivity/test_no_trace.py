"""Measuring leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from builders.sensitivity_models import (
    THREAT,
    assert_same,
    mean_loss,
    settings,
    snapshot,
)
from torch import Tensor, nn

from robust_prune.sensitivity import losses
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.sensitivity.estimators import ESTIMATORS, measure


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_model_is_left_as_it_came(resnet: nn.Module, adv: AdversarialSet, estimator: str) -> None:
    resnet.train()
    resnet.layer1[0].bn1.eval()
    resnet.stem[0].weight.requires_grad_(False)
    mean_loss(resnet, adv).backward()
    before = snapshot(resnet)
    with torch.no_grad():
        measure(resnet, adv, settings(estimator=estimator, ascent_steps=2))
    assert_same(before, snapshot(resnet))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("after", [0, 1, 5, 20])
def test_model_survives_an_exception(
    resnet: nn.Module, adv: AdversarialSet, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(resnet)
    plain: Callable[..., Tensor] = F.cross_entropy
    calls = 0

    def failing(*args: Tensor, **kwargs: str) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(losses.F, "cross_entropy", failing)
    with pytest.raises(KeyboardInterrupt):
        measure(resnet, adv)
    assert_same(before, snapshot(resnet))


def test_an_exception_inside_the_model_restores_forwards(resnet: nn.Module, adv: AdversarialSet) -> None:
    before = snapshot(resnet)
    wrong = AdversarialSet(torch.rand(2, 4, 8, 8), torch.tensor([0, 1]), THREAT, 0)
    with pytest.raises(RuntimeError):
        measure(resnet, wrong)
    assert_same(before, snapshot(resnet))
