"""SGD, what of a model it decays, and its learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..recipe import TrainSettings

FULL_RATE, FULL_RATE_STEPS = 0.1, 600


def peak_rate(settings: TrainSettings, steps: int) -> float:
    """The settings' peak learning rate, or where they leave it open, one that suits a run of `steps` steps.

    A high rate unsettles a cut network before it helps, and a run of few steps ends before it has helped;
    `benchmarks/results/recovery_settings.md` has what was measured.
    """
    if settings.lr is not None:
        return settings.lr
    return FULL_RATE * min(1.0, math.sqrt(steps / FULL_RATE_STEPS))


def make_optimizer(
    model: nn.Module, settings: TrainSettings, steps: int, device: torch.device
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum at the peak rate of a run of `steps` steps."""
    return torch.optim.SGD(
        decay_groups(model, settings.weight_decay),
        lr=peak_rate(settings, steps),
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        # One kernel for all weights. On a CPU it gains nothing, and would change the last bits of every result.
        fused=True if device.type == "cuda" else None,
    )


def make_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> Any:
    """timm's schedule over `steps` steps: a linear warm-up to the peak rate, then a cosine to zero."""
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
    """Optimizer parameter groups: matrices and kernels are decayed, norms and biases are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
