"""Adversarial distillation from the dense parent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders.training_sample import THREAT, batch_of, make_images, make_model, make_settings

from robust_prune.errors import UsageError
from robust_prune.training.losses import distilled, make_loss
from robust_prune.training.trainer import train


def test_distillation_is_the_divergence_from_the_teacher_on_adversarial_images() -> None:
    model, teacher = make_model(0).eval(), make_model(1).eval().requires_grad_(False)
    batch = batch_of(model, teacher=teacher)
    base = make_loss(make_settings(loss="pgd_at", label_smoothing=0.0))
    plain = base(model, batch)
    x_adv = batch.adversarial(lambda m: pytest.fail("the batch was attacked twice"))
    t = 2.0
    with torch.no_grad():
        expected = t * t * F.kl_div(
            F.log_softmax(model(x_adv) / t, 1), F.softmax(teacher(batch.x) / t, 1), reduction="batchmean"
        )  # fmt: skip
    whole = distilled(base, 1.0, t)(model, batch).loss
    half = distilled(base, 0.5, t)(model, batch).loss
    assert whole.item() == pytest.approx(expected.item(), rel=1e-5)
    assert half.item() == pytest.approx((plain.loss.item() + whole.item()) / 2, rel=1e-5)


def test_a_distilled_student_follows_its_teacher() -> None:
    teacher = make_model(1)
    train(teacher, make_images(96), make_images(30, 1), THREAT, make_settings(epochs=4))
    teacher.zero_grad()
    noise = make_images(96)
    noise.labels.copy_(noise.labels[torch.randperm(96, generator=torch.Generator().manual_seed(0))])
    student = make_model(2)
    # The labels are worthless: whatever is learnt comes from the teacher.
    settings = make_settings(epochs=4, distillation=1.0)
    train(student, noise, make_images(30, 1), THREAT, settings, teacher=teacher)
    x, y = make_images(60, 3).get(torch.arange(60))
    student.eval()
    assert (student(x.float() / 255).argmax(1) == y).float().mean() > 0.9
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_distillation_without_a_teacher_or_logits_is_refused(mine: Path) -> None:
    with pytest.raises(UsageError, match="needs the dense parent"):
        train(make_model(), make_images(60), make_images(30, 1), THREAT, make_settings(distillation=0.5))
    model = make_model()
    loss = make_loss(make_settings(loss=f"{mine}:scalar", distillation=0.5))
    with pytest.raises(UsageError, match=r"set LossResult.logits"):
        loss(model, batch_of(model, teacher=model))
