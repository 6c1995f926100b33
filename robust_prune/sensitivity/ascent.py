"""Projected gradient ascent of the robust loss over perturbations of one weight.

Each step moves `STRIDE` radii along the normalised gradient before it is projected. On a convex loss, infinitely long
steps (the generalised power method, Journee et al., 2010, arXiv 0811.4724) increase the loss in every iteration. Finite
steps retain part of the previous iterate, which prevents cycles where the loss is not convex. `initial_directions`
finds the starting points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .initial_directions import unit
from .losses import cross_entropy_sum, finite
from .recordings import Recordings
from .targets import Target, exchanged

STRIDE = 3.0
"""Initial step size, in radii of the ball."""

SHORTER = 0.25
"""Factor of the step size after a step that did not increase the loss; the next step starts at the best iterate."""

PLATEAU, PLATEAU_STEPS = 0.002, 2
"""An ascent stops after `PLATEAU_STEPS` steps in a row that each raise the loss increase by less than this share."""


def ascend(
    recordings: Recordings, target: Target, starts: Sequence[Tensor], radius: float, steps: int, base: float
) -> Tensor:
    """Maximise R over perturbations of one weight with ‖Δ‖_F <= `radius`, once from each initial direction.

    The first iterate is the boundary point along the initial direction. Each later iterate is a projected step along
    the normalised gradient from the best iterate; the step size is `STRIDE` radii and shrinks after steps that do not
    increase the loss. Cost of each step: one forward and one backward pass over the set; where a batch is recorded,
    both pass only through the layers behind the weight.

    Args:
        recordings: recordings of the loss to maximise that cover this weight.
        target: the weight to perturb.
        starts: initial directions, at least one, none of them zero.
        radius: Frobenius norm of the largest perturbation, > 0.
        steps: largest number of iterates of each ascent, >= 1; an ascent stops earlier on a plateau (`PLATEAU`).
        base: R at the unperturbed weights, in nats.

    Returns:
        The direction of the best iterate, with unit Frobenius norm.

    Raises:
        UsageError: a loss is not finite.
    """
    climbs = [_climb(recordings, target, start, radius, steps, base) for start in starts]
    return max(climbs, key=lambda found: found[1])[0]


def first_step(recordings: Recordings, target: Target, start: Tensor, radius: float) -> tuple[Tensor, float]:
    """Return the direction after one step from the boundary point along `start`, and a first-order estimate of R.

    Cost: one forward and one backward pass over the set, partial as in `ascend`.

    Args:
        recordings: as for `ascend`.
        target: the weight to perturb.
        start: initial direction with unit Frobenius norm.
        radius: Frobenius norm of the largest perturbation, > 0.

    Returns:
        A direction of unit Frobenius norm, and the maximum over the ball, in nats, of R linearised at the boundary
        point.

    Raises:
        UsageError: a loss is not finite.
    """
    delta = radius * start
    value, slope = _loss_and_slope(recordings, target, delta, True)
    if slope is None or float(slope.norm()) == 0:
        return start, value
    rise = radius * float(slope.norm()) - float((slope * delta).sum())
    return unit(_stepped(delta, slope, STRIDE, radius)), value + rise / len(recordings.loss.adv)


def _stepped(delta: Tensor, slope: Tensor, stride: float, radius: float) -> Tensor:
    moved = delta + stride * radius * unit(slope)
    return moved * min(1.0, radius / max(float(moved.norm()), torch.finfo(moved.dtype).tiny))


def _climb(
    recordings: Recordings, target: Target, direction: Tensor, radius: float, steps: int, base: float
) -> tuple[Tensor, float]:
    """Return the direction of the best iterate, and R there."""
    delta = radius * unit(direction)
    best, best_loss, uphill, idle, stride = delta, -math.inf, None, 0, STRIDE
    for step in range(steps):
        value, slope = _loss_and_slope(recordings, target, delta, step + 1 < steps)
        idle = 0 if value - base > (1 + PLATEAU) * max(best_loss - base, 0.0) else idle + 1
        if value > best_loss:
            best, best_loss, uphill = delta, value, slope
        else:
            stride *= SHORTER
        if uphill is None or float(uphill.norm()) == 0 or idle == PLATEAU_STEPS:
            break
        delta = _stepped(best, uphill, stride, radius)
    return unit(best), best_loss


def _loss_and_slope(
    recordings: Recordings, target: Target, delta: Tensor, need_slope: bool
) -> tuple[float, Tensor | None]:
    loss, total = recordings.loss, 0.0
    slope = torch.zeros_like(delta) if need_slope else None
    moved = (target.weight.detach() + delta).requires_grad_(need_slope)
    for x, y, recording in recordings.batches():
        # The backward pass is inside as well, since checkpointed layers run forward again in it.
        with exchanged(target, moved) as weight:
            with torch.set_grad_enabled(need_slope), loss.autocast():
                value = cross_entropy_sum(recordings.replay(target.weight, x, recording), y)
            # Without a gradient, this batch takes a path through the model that does not use the weight.
            if slope is not None and value.requires_grad:
                (part,) = torch.autograd.grad(value, weight, allow_unused=True)
                slope += 0 if part is None else part
        total += finite(value.item(), f"while ascending on {target.name!r}")
    return total / len(loss.adv), slope
