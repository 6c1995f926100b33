"""Projected gradient descent (Madry et al., 2018, arXiv 1706.06083)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .objectives import Objective, Watch, cross_entropy
from .projections import ascent_step, project, random_start
from .threat import ThreatModel


def default_step_size(threat: ThreatModel, steps: int) -> float:
    """Return the step size in pixel units: epsilon / 4, or 2.5 epsilon / steps if that is larger; at most epsilon."""
    return min(threat.epsilon, max(threat.epsilon / 4, 2.5 * threat.epsilon / max(steps, 1)))


def input_gradient(model: nn.Module, x: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the gradient of the summed per-sample objective with respect to the images.

    The sum, unlike the mean, keeps gradients of half-precision passes from underflowing. Cost: one forward and one
    backward pass.

    Returns:
        The gradient [N, C, H, W], with NaN replaced by 0 and infinities by ±1, and the objective at `x` [N], detached.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        values = objective(model(x).float())
        (gradient,) = torch.autograd.grad(values.sum(), x)
    # The square root of a black pixel has an infinite derivative, which would turn the image into NaN.
    return gradient.nan_to_num(0.0, 1.0, -1.0), values.detach()


def cross_entropy_objective(y: Tensor) -> Objective:
    """Return the objective that maps logits [N, K] to their cross-entropy [N], in nats, to labels `y` [N]."""

    def objective(logits: Tensor) -> Tensor:
        return cross_entropy(logits, y)

    return objective


# More than eight parameters: these are the attack's own, under the names of other attack libraries.
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    objective: Objective | None = None,
    keep_best: bool = True,
    start: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return adversarial images that maximise `objective` within the threat model.

    The caller sets eval mode and freezes the parameters (`frozen_eval`), which makes the attack faster. Cost of each
    restart: `steps` forward and backward passes, and one more forward pass with `keep_best`.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K].
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        threat: norm and radius.
        steps: gradient steps of each restart.
        step_size: step size in pixel units; by default `default_step_size`.
        restarts: number of random restarts; with `keep_best` the best iterate of all is returned, otherwise the last
            iterate of the last restart.
        generator: random number generator of the restarts.
        objective: maps logits [N, K] to values [N]; by default the cross-entropy to `y`.
        keep_best: return for each image the iterate with the highest objective rather than the last one, so that the
            objective never ends below its value at the starting point.
        start: points [N, C, H, W] at which every restart begins, in place of random ones.
        watch: is told every iterate, for instance to ask another model; it has no effect on the attack.

    Returns:
        Images [N, C, H, W] in the epsilon-ball around `x` and in [0, 1].
    """
    objective = objective or cross_entropy_objective(y)
    step = default_step_size(threat, steps) if step_size is None else step_size
    best = x.detach().clone()
    best_value = torch.full((len(x),), -torch.inf, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        begin = random_start(x, threat, generator) if start is None else start
        x_adv = project(begin.detach(), x, threat)
        for _ in range(steps):
            if watch is not None:
                watch(x_adv, rows)
            gradient, values = input_gradient(model, x_adv, objective)
            if keep_best:
                best, best_value = _better(best, best_value, x_adv, values)
            x_adv = project(ascent_step(x_adv.detach(), gradient, step, threat), x, threat)
        if watch is not None:
            watch(x_adv, rows)
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
