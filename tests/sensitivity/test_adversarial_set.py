"""The adversarial set: in the ball, seeded, of distinct images."""

from __future__ import annotations

import pytest
import torch
from builders.sensitivity_models import (
    THREAT,
    assert_same,
    loss_value,
    snapshot,
)
from torch import nn

from robust_prune.attacks import ThreatModel
from robust_prune.data.base import TensorImages, random_images
from robust_prune.errors import UsageError
from robust_prune.recipe import SensitivitySection
from robust_prune.sensitivity.adversarial_set import AdversarialSet, make_adversarial_set


def test_adversarial_set(resnet: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = TensorImages(pixels, torch.randint(5, (30,), generator=generator))
    resnet.train()
    before = snapshot(resnet)
    few = SensitivitySection(images=16, steps=5)
    made = make_adversarial_set(resnet, images, THREAT, few, batch_size=6, seed=3)
    assert_same(before, snapshot(resnet))
    again = make_adversarial_set(resnet, images, THREAT, few, batch_size=6, seed=3)
    other = make_adversarial_set(resnet, images, THREAT, few, batch_size=6, seed=4)
    assert torch.equal(made.images, again.images) and not torch.equal(made.images, other.images)
    assert made.images.dtype == torch.float32 and made.labels.dtype == torch.int64 and len(made) == 16
    assert made.images.min() >= 0 and made.images.max() <= 1
    clean = pixels.float() / 255
    distance = (made.images.unsqueeze(1) - clean.unsqueeze(0)).abs().flatten(2).amax(2)
    nearest, source = distance.min(1)
    assert nearest.max() <= 8 / 255 + 1e-6 and len(source.unique()) == 16
    assert torch.equal(images.labels[source], made.labels)
    resnet.eval()
    attacked = loss_value(resnet, made)
    assert attacked > loss_value(resnet, AdversarialSet(clean[source], made.labels, THREAT, 0))


def test_the_images_are_drawn_under_the_seed(resnet: nn.Module) -> None:
    pixels = torch.randint(0, 256, (30, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images, few = TensorImages(pixels, torch.arange(30) % 5), SensitivitySection(images=16, steps=1)
    # With no room for an attack they are what was drawn.
    one, again, other = (
        make_adversarial_set(resnet, images, ThreatModel("linf", 0.0), few, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert torch.equal(other.images, random_images(images, 16, 1)[0])


def test_adversarial_set_refuses_nonsense(resnet: nn.Module) -> None:
    empty = TensorImages(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UsageError, match="needs training images"):
        make_adversarial_set(resnet, empty, THREAT)
    with pytest.raises(UsageError, match="batch_size of the adversarial set must be at least 1, got 0"):
        make_adversarial_set(resnet, empty, THREAT, batch_size=0)
    with pytest.raises(UsageError, match="one label an image"):
        AdversarialSet(torch.zeros(2, 3, 8, 8), torch.zeros(1, dtype=torch.int64), THREAT, 0)
