"""Adversarial weight perturbation: uphill by a share, and back to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.training_sample import THREAT, Killed, batch_of, make_images, make_model, make_settings, weights_of

from robust_prune.attacks import kept_buffers
from robust_prune.training import trainer
from robust_prune.training.losses import Batch, LossResult, make_loss
from robust_prune.training.perturbation import perturbed_weights
from robust_prune.training.trainer import train


def test_weights_move_uphill_by_their_share_and_come_back_exactly() -> None:
    model = make_model().eval()
    batch = batch_of(model)
    loss = make_loss(make_settings(loss="pgd_at"))
    before = weights_of(model)
    result = loss(model, batch)
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with perturbed_weights(model, gradients, 0.01):
        assert loss(model, batch).loss > result.loss
        for name, parameter in model.named_parameters():
            moved = (parameter - before[name]).norm() / before[name].norm().clamp_min(1e-9)
            assert moved.item() == pytest.approx(0.01 if parameter.ndim > 1 else 0.0, rel=1e-3)
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())
    with pytest.raises(Killed), perturbed_weights(model, gradients, 0.5):
        raise Killed
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


def test_statistics_do_not_see_the_extra_pass() -> None:
    model = make_model().train()
    before = copy.deepcopy(model[1].state_dict())
    with kept_buffers(model):
        model(torch.rand(4, 3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model[1].state_dict().items())


def test_perturbed_training_learns_and_waits_for_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    result = train(model, make_images(96), make_images(30, 1), THREAT, make_settings(epochs=4, awp=0.01))
    assert result.history[-1].val_clean > 0.9
    passes = [0]
    forward = trainer._Run._forward_backward

    def counted(run: trainer._Run, batch: Batch) -> LossResult:
        passes[0] += 1
        return forward(run, batch)

    monkeypatch.setattr(trainer._Run, "_forward_backward", counted)
    train(make_model(), make_images(96), make_images(30, 1), THREAT, make_settings(epochs=2, awp=0.01, awp_warmup=0.5))
    assert passes[0] == 6 + 2 * 6
