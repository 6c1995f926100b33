"""Fixtures of more than one file."""

from __future__ import annotations

import pytest
import torch
from evaluation_sample import Tiny, generated, train_tiny
from sensitivity_models import TinyResNet, noise_set, randomised
from torch import nn

from robust_prune.data.base import TensorImages
from robust_prune.sensitivity.adversarial_set import AdversarialSet


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomised(TinyResNet())


@pytest.fixture
def adv() -> AdversarialSet:
    return noise_set((3, 8, 8), 5)


@pytest.fixture(scope="module")
def trained() -> Tiny:
    return train_tiny()


@pytest.fixture(scope="module")
def images() -> TensorImages:
    return generated(150, seed=1)
