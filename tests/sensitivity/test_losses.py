"""Parts of the adversarial set stand for the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from builders.sensitivity_models import THREAT, by_name
from torch import nn

from robust_prune.sensitivity import losses
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.sensitivity.estimators import measure


def test_parts_represent_the_set_in_whatever_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 4)).requires_grad_(False)
    images, labels = torch.rand(200, 3, 4, 4), torch.randint(4, (200,))
    whole = F.cross_entropy(model(images), labels, reduction="none")
    order = torch.randperm(200)
    found = []
    for chosen in (torch.arange(200), order):
        adv = AdversarialSet(images[chosen], labels[chosen], THREAT, 0)
        found.append(losses.RobustLoss(model, adv, 64, torch.device("cpu")).stratified().part(20))
    part, other = (loss.adv for loss in found)
    assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)
    counts = torch.bincount(part.labels, minlength=4) - torch.bincount(labels, minlength=4) / 10
    assert counts.abs().max() <= 1
    mine = F.cross_entropy(model(part.images), part.labels, reduction="none")
    assert mine.mean().item() == pytest.approx(whole.mean().item(), rel=0.02)
    assert mine.std().item() == pytest.approx(whole.std().item(), rel=0.1)


def test_images_in_another_order_give_the_same(resnet: nn.Module, adv: AdversarialSet) -> None:
    flipped = AdversarialSet(adv.images.flip(0), adv.labels.flip(0), THREAT, adv.seed)
    resnet.double()  # so that sums in another order agree
    there, back = (by_name(measure(resnet, found, radii=())) for found in (adv, flipped))
    assert there == pytest.approx(back, rel=1e-9, abs=1e-12)
