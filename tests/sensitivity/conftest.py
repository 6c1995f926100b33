"""Models and adversarial sets for the tests of sensitivity."""

from __future__ import annotations

import pytest
import torch
from builders.sensitivity_models import TinyResNet, noise_set, randomised_norms
from torch import nn

from robust_prune.sensitivity.adversarial_set import AdversarialSet


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomised_norms(TinyResNet())


@pytest.fixture
def adv() -> AdversarialSet:
    return noise_set((3, 8, 8), 5)


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4)).double()


@pytest.fixture
def mlp_adv() -> AdversarialSet:
    return noise_set((3, 2, 2), 4, count=20)
