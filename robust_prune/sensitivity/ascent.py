"""Directions in which a perturbation of one weight raises the robust loss most.

At a trained model the mean gradient of a weight is almost zero, so that its direction is mostly noise and a step along
it finds a fraction of the loss that the ball holds. Three things make the search short:

- A *joint* step first: all weights are moved a little along their gradients at once, and the gradients taken there.
  One pass turns every direction towards where the loss curves up, as one step of power iteration would.
- Long steps: `STRIDE` radii along the normalised gradient before projecting. On a convex loss a step of infinite length
  (the generalised power method, Journee et al., 2010, arXiv 0811.4724) rises in every step; a finite one remembers
  where it was, which keeps it from cycling where the loss is not convex.
- The *other side*: to second order a direction and its opposite are equally steep, so that where an ascent ends is
  often a matter of the side it began on. Beyond second order they differ, up to fourfold: both are climbed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from .losses import RobustLoss, cross_entropy_sum, finite
from .replay import Recording, Trace, record, replay
from .targets import Target, exchanged

STRIDE = 3.0
"""Length of an ascent step in radii of the ball."""

JOINT_SHARE = 0.1
"""How far into its ball each weight goes in the joint step. All move at once, so that more would leave the basin."""

PLATEAU, PLATEAU_STEPS = 0.002, 2
"""When an ascent has arrived: this many steps in a row that gain less than this share of what was gained before."""


def joint_directions(
    loss: RobustLoss, targets: Sequence[Target], gradients: Sequence[Tensor], rho: float
) -> list[Tensor]:
    """Gradients at a point where every target has moved along its own gradient by a share of its ball's radius.

    One forward and backward over the set.

    Args:
        loss: what to raise.
        targets: distinct weights.
        gradients: of R with respect to each, not zero.
        rho: relative radius of the balls, > 0.

    Returns:
        A direction a target, unit Frobenius norm; its own gradient where the one at the moved point vanishes.

    Raises:
        UsageError: the loss at the moved point is not finite.
    """
    with ExitStack() as stack:
        moved = []
        for target, gradient in zip(targets, gradients, strict=True):
            length = JOINT_SHARE * rho * target.weight.detach().norm()
            there = (target.weight.detach() + length * unit(gradient)).requires_grad_(True)
            moved.append(stack.enter_context(exchanged(target, there)))
        found = loss.gradients(moved, lambda: None)[1]
    return [
        unit(old if new is None or float(new.norm()) == 0 else new) for old, new in zip(gradients, found, strict=True)
    ]


def unit(direction: Tensor) -> Tensor:
    """`direction`, not zero, scaled to Frobenius norm 1."""
    return direction / direction.norm()


def ascend(
    loss: RobustLoss,
    trace: Trace,
    target: Target,
    direction: Tensor,
    radius: float,
    steps: Sequence[int],
    cache_bytes: int,
    base: float,
) -> Tensor:
    """Projected gradient ascent of R over perturbations of one weight with ‖Δ‖_F <= `radius`.

    The first iterate is the boundary point along `direction`; each later one takes a step of `STRIDE` radii along the
    normalised gradient and projects back. A second ascent begins on the other side, at the opposite of where the first
    was highest. Per step one forward and one backward over the set, both only through what lies behind the weight, as
    long as the inputs to that part fit into `cache_bytes` (batches beyond that are computed in full).

    Args:
        loss: what to maximise.
        trace: of the same model.
        target: whose weight moves.
        direction: where to begin; not zero.
        radius: of the ball, > 0.
        steps: most iterates of each ascent, one or two counts >= 1. A climb ends before that once `PLATEAU_STEPS`
            of them in a row raise the rise of the loss by less than `PLATEAU`.
        cache_bytes: limit on what is kept between the steps.
        base: R at the given weights.

    Returns:
        The direction of the best iterate, unit Frobenius norm.

    Raises:
        UsageError: a loss is not finite.
    """
    kept = _KeptBatches(loss, trace, trace.frontier(target.weight), cache_bytes)
    best, highest = _climb(loss, kept, target, direction, radius, steps[0], base)
    for count in steps[1:]:
        other, value = _climb(loss, kept, target, -best, radius, count, base)
        best, highest = (other, value) if value > highest else (best, highest)
    return best


def _climb(
    loss: RobustLoss, kept: _KeptBatches, target: Target, direction: Tensor, radius: float, steps: int, base: float
) -> tuple[Tensor, float]:
    """The direction of the best iterate, and R there."""
    delta = radius * unit(direction)
    best, best_loss, idle = delta, -math.inf, 0
    for step in range(steps):
        value, slope = _loss_and_slope(loss, kept, target, delta, step + 1 < steps)
        idle = 0 if value - base > (1 + PLATEAU) * max(best_loss - base, 0.0) else idle + 1
        if value > best_loss:
            best, best_loss = delta, value
        if slope is None or float(slope.norm()) == 0 or idle == PLATEAU_STEPS:
            break
        moved = delta + STRIDE * radius * unit(slope)
        delta = moved * min(1.0, radius / max(float(moved.norm()), torch.finfo(moved.dtype).tiny))
    return unit(best), best_loss


def _loss_and_slope(
    loss: RobustLoss, kept: _KeptBatches, target: Target, delta: Tensor, need_slope: bool
) -> tuple[float, Tensor | None]:
    total = 0.0
    slope = torch.zeros_like(delta) if need_slope else None
    moved = (target.weight.detach() + delta).requires_grad_(need_slope)
    for position, (x, y) in enumerate(loss.batches()):
        recording = kept.get(position, x)
        with exchanged(target, moved) as weight, torch.set_grad_enabled(need_slope), loss.autocast():
            value = cross_entropy_sum(kept.run(x, recording), y)
        if slope is not None:
            slope += torch.autograd.grad(value, weight)[0]
        total += finite(value.item(), f"while ascending on {target.name!r}")
    return total / len(loss.adv), slope


class _KeptBatches:
    """Recordings of one weight's frontier, kept across passes while they fit into a budget."""

    def __init__(self, loss: RobustLoss, trace: Trace, frontier: frozenset[int], limit: int) -> None:
        self._loss, self._trace, self._frontier, self._limit = loss, trace, frontier, limit
        self._held: dict[int, Recording] = {}
        self._bytes = 0

    def get(self, position: int, x: Tensor) -> Recording:
        """The recording of batch `position`; an empty one once the budget is spent."""
        held = self._held.get(position)
        if held is None:
            held = Recording()
            if self._frontier and self._bytes < self._limit:
                with self._loss.autocast():
                    held = record(self._loss.model, self._trace, x, self._frontier)[1]
                size = held.nbytes()
                if self._bytes + size > self._limit:
                    held, size = Recording(), self._limit - self._bytes
                self._bytes += size
            self._held[position] = held
        return held

    def run(self, x: Tensor, recording: Recording) -> Tensor:
        """The model's output with the recorded prefix."""
        return replay(self._loss.model, self._trace, x, recording, self._frontier)
