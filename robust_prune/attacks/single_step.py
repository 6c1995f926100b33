"""Single-step adversarial examples for training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .pgd import cross_entropy_objective, input_gradient
from .projections import ascent_step, random_start
from .threat import ThreatModel


def n_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    noise: float = 2.0,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return N-FGSM examples (de Jorge et al., 2022, arXiv 2202.01181): strong noise, one step and no projection.

    They are meant for training only: they may lie up to ``(noise + alpha) * epsilon`` away from `x`, which prevents
    catastrophic overfitting. Cost: one forward and one backward pass.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K].
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        threat: norm and radius.
        noise: radius of the uniform noise, in multiples of epsilon.
        alpha: step size, in multiples of epsilon.
        generator: random number generator of the noise.

    Returns:
        Images [N, C, H, W] in [0, 1].
    """
    reach = noise * threat.epsilon
    wide = ThreatModel(threat.norm, min(reach, 1.0) if threat.norm == "linf" else reach)
    start = random_start(x, wide, generator)
    gradient, _ = input_gradient(model, start, cross_entropy_objective(y))
    return ascent_step(start, gradient, alpha * threat.epsilon, threat).clamp_(0, 1).detach()
