"""Projected gradient descent (Madry et al., 2018, arXiv 1706.06083)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .objectives import Objective, cross_entropy
from .projections import ascent_step, project, random_start
from .threat import ThreatModel


def default_step_size(threat: ThreatModel, steps: int) -> float:
    """Step size in pixel units: epsilon / 4, more when `steps` of that length could not cross the ball."""
    return min(threat.epsilon, max(threat.epsilon / 4, 2.5 * threat.epsilon / max(steps, 1)))


def input_gradient(model: nn.Module, x: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Gradient of the summed per-sample objective with respect to the images.

    The sum, not the mean, keeps gradients of half-precision passes from underflowing. One forward, one backward.

    Returns:
        The gradient ([N, C, H, W]) and the objective at `x` ([N], detached).
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        values = objective(model(x).float())
        (gradient,) = torch.autograd.grad(values.sum(), x)
    # A square root of a black pixel has an infinite slope; let through, it would make the image NaN.
    return gradient.nan_to_num(0.0, 1.0, -1.0), values.detach()


def cross_entropy_objective(y: Tensor) -> Objective:
    """Per-sample cross-entropy to labels `y`, in nats."""

    def objective(logits: Tensor) -> Tensor:
        return cross_entropy(logits, y)

    return objective


# Eleven parameters: an attack's own knobs, as other libraries of attacks name them; callers set two or three.
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    start_random: bool = True,
    generator: torch.Generator | None = None,
    objective: Objective | None = None,
    keep_best: bool = True,
) -> Tensor:
    """Adversarial images that maximise `objective` inside the threat model.

    The caller chooses eval mode and freezes parameters (`frozen_eval`), which makes the attack faster. Cost per
    restart: `steps` forwards and backwards, and one more forward with `keep_best`.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K].
        x: images in [0, 1].
        y: labels [N].
        threat: norm and radius.
        steps: gradient steps of each restart.
        step_size: in pixel units; see `default_step_size`.
        restarts: independent random starts; the best is kept per image.
        start_random: start in a random point of the ball rather than at `x`.
        generator: source of the random starts.
        objective: logits -> [N]; cross-entropy to `y` by default.
        keep_best: return the iterate of highest objective rather than the last, so that the objective never ends
            below its value at the start of the attack.

    Returns:
        Images [N, C, H, W] inside the epsilon-ball around `x` and inside [0, 1].
    """
    objective = objective or cross_entropy_objective(y)
    step = default_step_size(threat, steps) if step_size is None else step_size
    best = x.detach().clone()
    best_value = torch.full((len(x),), -torch.inf, device=x.device)
    for _ in range(restarts):
        x_adv = random_start(x, threat, generator) if start_random else x.detach().clone()
        x_adv = project(x_adv, x, threat)
        for _ in range(steps):
            gradient, values = input_gradient(model, x_adv, objective)
            if keep_best:
                best, best_value = _better(best, best_value, x_adv, values)
            x_adv = project(ascent_step(x_adv.detach(), gradient, step, threat), x, threat)
        if not keep_best:
            best = x_adv
            continue
        with torch.no_grad():
            best, best_value = _better(best, best_value, x_adv, objective(model(x_adv).float()))
    return best.detach()


def _better(best: Tensor, best_value: Tensor, x_adv: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    wins = values > best_value
    mask = wins.view(-1, *[1] * (best.ndim - 1))
    return torch.where(mask, x_adv.detach(), best), torch.where(wins, values, best_value)
