"""The SGD optimizer, its weight decay and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..recipe import TrainSettings

FULL_RATE, FULL_RATE_STEPS = 0.1, 600


def peak_rate(settings: TrainSettings, steps: int) -> float:
    """Return the peak learning rate of the settings or, if it is not set, 0.1 min(1, sqrt(steps / 600)).

    A high learning rate first disturbs a pruned network, and a run of few steps ends before it recovers;
    `benchmarks/results/recovery_settings.md` has the measurements.
    """
    if settings.lr is not None:
        return settings.lr
    return FULL_RATE * min(1.0, math.sqrt(steps / FULL_RATE_STEPS))


def make_optimizer(
    model: nn.Module, settings: TrainSettings, steps: int, device: torch.device
) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum and the peak learning rate of a run of `steps` steps."""
    return torch.optim.SGD(
        decay_groups(model, settings.weight_decay),
        lr=peak_rate(settings, steps),
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        # On a CPU the fused kernel gains nothing and would change the last bits of every result.
        fused=True if device.type == "cuda" else None,
    )


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> Any:
    """Return timm's schedule over `steps` steps: linear warm-up to the peak learning rate, cosine decay to zero."""
    from timm.scheduler import CosineLRScheduler

    warmup = int(settings.warmup * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps - warmup, 1),  # counted from the end of the warm-up, because of warmup_prefix
        warmup_t=warmup,
        warmup_lr_init=peak_rate(settings, steps) / 100,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: weight decay for matrices and kernels, none for norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
