"""Modes and flags come back."""

from __future__ import annotations

import pytest
import torch
from builders.attacked import conv_model

from robust_prune.attacks import ThreatModel, frozen_eval, pgd


def test_frozen_eval_restores_each_module_and_parameter_even_after_an_error():
    model = conv_model().train()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), frozen_eval(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        pgd(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), ThreatModel(), steps=1)
        raise RuntimeError("stop")
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
