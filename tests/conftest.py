"""Fixtures of more than one file."""

from __future__ import annotations

import pytest
import torch
from sensitivity_models import TinyResNet, noise_set, randomised
from torch import nn

from robust_prune.sensitivity.adversarial_set import AdversarialSet


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomised(TinyResNet())


@pytest.fixture
def adv() -> AdversarialSet:
    return noise_set((3, 8, 8), 5)
