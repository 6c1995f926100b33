"""Projected gradient ascent of the robust loss over perturbations of one weight.

Steps are long: `STRIDE` radii along the normalised gradient before projecting. On a convex loss a step of infinite
length (the generalised power method, Journee et al., 2010, arXiv 0811.4724) rises in every step; a finite one remembers
where it was, which keeps it from cycling where the loss is not convex. Where to begin
`initial_directions` says.
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
"""Length of an ascent step in radii of the ball, at first."""

SHORTER = 0.25
"""What a step that led down is shortened to before it is tried again from the highest point."""

PLATEAU, PLATEAU_STEPS = 0.002, 2
"""When an ascent has arrived: this many steps in a row that gain less than this share of what was gained before."""


def ascend(
    recordings: Recordings, target: Target, starts: Sequence[Tensor], radius: float, steps: int, base: float
) -> Tensor:
    """Projected gradient ascent of R over perturbations of one weight with ‖Δ‖_F <= `radius`, once from each start.

    The first iterate is the boundary point along the start; each later one steps from the highest so far along the
    normalised gradient, by `STRIDE` radii or, after steps that led down, less, and projects back. Per step one forward
    and one backward over the set, both only through what lies behind the weight where a batch is recorded.

    Args:
        recordings: of the loss to maximise, for this weight among others.
        target: whose weight moves.
        starts: directions to begin with, at least one; not zero.
        radius: of the ball, > 0.
        steps: most iterates of each ascent, >= 1. One ends before that once `PLATEAU_STEPS` of them in a row raise the
            rise of the loss by less than `PLATEAU`.
        base: R at the given weights.

    Returns:
        The direction of the best iterate, unit Frobenius norm.

    Raises:
        UsageError: a loss is not finite.
    """
    climbs = [_climb(recordings, target, start, radius, steps, base) for start in starts]
    return max(climbs, key=lambda found: found[1])[0]


def first_step(recordings: Recordings, target: Target, start: Tensor, radius: float) -> tuple[Tensor, float]:
    """The direction after one step from the boundary point along `start`, and how high it leads to first order.

    One forward and backward over the set, partial as in `ascend`.

    Args:
        recordings: as for `ascend`.
        target: whose weight moves.
        start: direction to begin with, unit Frobenius norm.
        radius: of the ball, > 0.

    Returns:
        A direction of unit Frobenius norm, and the maximum over the ball of R made linear about the boundary point.

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
    """The direction of the best iterate, and R there."""
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
        with exchanged(target, moved) as weight, torch.set_grad_enabled(need_slope), loss.autocast():
            value = cross_entropy_sum(recordings.replay(target.weight, x, recording), y)
        if slope is not None and value.requires_grad:  # else this batch took a path that does not use the weight
            (part,) = torch.autograd.grad(value, weight, allow_unused=True)
            slope += 0 if part is None else part
        total += finite(value.item(), f"while ascending on {target.name!r}")
    return total / len(loss.adv), slope
