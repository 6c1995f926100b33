"""Each loss is what its paper says, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from builders.training_sample import THREAT, batch_of, make_images, make_model, make_settings

from robust_prune.attacks import ThreatModel
from robust_prune.catalogue import LOSSES
from robust_prune.errors import UsageError
from robust_prune.training.losses import Batch, make_loss


def test_trades_matches_its_definition_and_survives_extreme_logits():
    model = make_model().eval()
    x, y = make_images(6).get(torch.arange(6))
    batch = Batch(x.float() / 255, y, ThreatModel("linf", 0.0), torch.Generator().manual_seed(0), model)
    loss = make_loss(make_settings(loss="trades", steps=1, label_smoothing=0.0))
    # With epsilon 0 both distributions are the same and only the clean cross-entropy is left.
    assert loss(model, batch).loss.item() == pytest.approx(F.cross_entropy(model(batch.x), y).item(), rel=1e-5)
    with torch.no_grad():
        model[5].weight.mul_(1e6)
    steep = Batch(batch.x, y, THREAT, torch.Generator().manual_seed(0), model)
    assert torch.isfinite(loss(model, steep).loss)


def test_mart_matches_its_definition_and_survives_extreme_logits() -> None:
    model = make_model().eval()
    loss = make_loss(make_settings(loss="mart", label_smoothing=0.0))
    batch = batch_of(model, epsilon=0.0)
    with torch.no_grad():
        p = model(batch.x).softmax(1)
        rival = p.clone().scatter(1, batch.y[:, None], 0).amax(1)
        expected = (-p.gather(1, batch.y[:, None]).squeeze(1).log() - (1 - rival).log()).mean()
    # With epsilon 0 the divergence is 0 and the boosted cross-entropy is left.
    assert loss(model, batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        model[5].weight.mul_(1e6)
    result = loss(model, batch_of(model))
    result.loss.backward()
    assert torch.isfinite(result.loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_losses_leave_modes_and_flags_alone():
    model = make_model().train()
    model[1].eval()
    x, y = make_images(6).get(torch.arange(6))
    batch = Batch(x.float() / 255, y, THREAT, torch.Generator().manual_seed(0), model)
    for name in LOSSES.names:
        make_loss(make_settings(loss=name))(model, batch).loss.backward()
        assert model.training and not model[1].training and model[0].weight.requires_grad


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"must be one of clean, .* or file.py:function"):
        make_settings(loss="magic")
    with pytest.raises(UsageError, match=r"loss must be one of clean, .*, got 'magic'"):
        make_loss(make_settings().model_copy(update={"loss": "magic"}))
