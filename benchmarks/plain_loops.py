"""Adversarial training steps as published by their authors, as baselines of our training loop.

They are reimplemented after the official repositories: N-FGSM (github.com/pdejorge/N-FGSM, train.py), PGD-AT
(github.com/locuslab/robust_overfitting, train_cifar.py, one restart), TRADES (github.com/yaodongyu/TRADES, trades.py).
Differences between them are preserved. N-FGSM and PGD-AT attack in train mode, TRADES in eval mode. PGD-AT computes the
gradient of the images by ``loss.backward()``, which also computes those of all weights; the others use
``torch.autograd.grad``. PGD-AT ends its attack with an additional forward pass that keeps the worst restart. TRADES
computes the clean distribution again in every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel
from robust_prune.recipe import TrainSettings

Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor, ThreatModel, TrainSettings], None]


def n_fgsm_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, threat: ThreatModel, _: TrainSettings
) -> None:
    """Run an N-FGSM step: two forward and backward passes."""
    model.train()
    noise = torch.empty_like(x).uniform_(-2 * threat.epsilon, 2 * threat.epsilon)
    noise.requires_grad_(True)
    gradient = torch.autograd.grad(F.cross_entropy(model(x + noise), y), noise)[0].detach()
    delta = (noise + threat.epsilon * gradient.sign()).detach()
    loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def pgd_at_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, threat: ThreatModel, s: TrainSettings
) -> None:
    """Run a PGD-AT step: `steps` + 2 forward and `steps` + 1 backward passes."""
    model.train()
    worst, worst_loss = torch.zeros_like(x), torch.zeros(len(y), device=x.device)
    delta = torch.empty_like(x).uniform_(-threat.epsilon, threat.epsilon)
    delta = (x + delta).clamp(0, 1) - x
    delta.requires_grad_(True)
    for _ in range(s.steps):
        F.cross_entropy(model(x + delta), y).backward()
        assert delta.grad is not None
        moved = (delta + threat.epsilon / 4 * delta.grad.sign()).clamp(-threat.epsilon, threat.epsilon)
        delta.data = ((x + moved).clamp(0, 1) - x).detach()
        delta.grad.zero_()
    losses = F.cross_entropy(model(x + delta), y, reduction="none")
    worse = losses >= worst_loss
    worst[worse] = delta.detach()[worse]
    loss = F.cross_entropy(model((x + worst).clamp(0, 1)), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def trades_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, threat: ThreatModel, s: TrainSettings
) -> None:
    """Run a TRADES step: 2 x `steps` + 2 forward and `steps` + 2 backward passes."""
    model.eval()
    x_adv = x.detach() + 0.001 * torch.randn_like(x)
    for _ in range(s.steps):
        x_adv.requires_grad_()
        divergence = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")
        gradient = torch.autograd.grad(divergence, [x_adv])[0]
        x_adv = x_adv.detach() + threat.epsilon / 4 * gradient.detach().sign()
        x_adv = torch.min(torch.max(x_adv, x - threat.epsilon), x + threat.epsilon).clamp(0, 1)
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    divergence = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(logits, 1), reduction="sum") / len(x)
    (F.cross_entropy(logits, y) + s.beta * divergence).backward()
    optimizer.step()


PLAIN_STEPS: dict[str, Step] = {"n_fgsm": n_fgsm_step, "pgd_at": pgd_at_step, "trades": trades_step}
