"""Robust loss over the adversarial set, its weight gradients, and its value under perturbed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from .adversarial_set import AdversarialSet
from .replay import Recording, Trace, record, replay
from .targets import Target, exchanged

PLATEAU, PLATEAU_STEPS = 0.002, 2
"""When an ascent has arrived: this many steps in a row that gain less than this share of what was gained before."""


@dataclass(frozen=True)
class RobustLoss:
    """R(theta): mean cross-entropy of `model` over a fixed adversarial set, in nats.

    The model must be in eval mode and on `device`. Images come in `layout`.
    """

    model: nn.Module
    adv: AdversarialSet
    batch_size: int
    device: torch.device
    layout: torch.memory_format = torch.contiguous_format

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images in the model's precision and labels, in order, on the device."""
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        dtype = next(floats, torch.float32)
        for start in range(0, len(self.adv), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = self.adv.images[part].to(self.device, dtype)
            yield images.contiguous(memory_format=self.layout), self.adv.labels[part].to(self.device)

    @property
    def num_batches(self) -> int:
        """Number of batches of one pass."""
        return math.ceil(len(self.adv) / self.batch_size)

    def gradients(self, weights: Sequence[Tensor], tick: Callable[[], None]) -> tuple[float, list[Tensor | None]]:
        """R and its gradient with respect to each of `weights`, from one forward and backward over the set.

        Args:
            weights: parameters of the model that require gradients.
            tick: called after each batch.

        Returns:
            The loss and the gradients, None for a weight that the loss does not depend on.

        Raises:
            UsageError: the loss or a gradient is not finite.
        """
        total = 0.0
        sums: list[Tensor | None] = [None] * len(weights)
        for x, y in self.batches():
            with torch.enable_grad():
                loss = F.cross_entropy(self.model(x), y, reduction="sum")
                parts = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
            total += finite(loss.item(), "at the given weights")
            for position, part in enumerate(parts):
                if part is not None:
                    held = sums[position]
                    sums[position] = part if held is None else held + part
            tick()
        scaled = [None if part is None else part / len(self.adv) for part in sums]
        for gradient in scaled:
            if gradient is not None:
                finite(float(gradient.norm()), "in its weight gradients")
        return total / len(self.adv), scaled


@dataclass(frozen=True)
class Ray:
    """Perturbations of one weight along one direction.

    Attributes:
        target: whose weight.
        direction: unit Frobenius norm, the weight's shape.
        lengths: Frobenius norms of the perturbations.
    """

    target: Target
    direction: Tensor
    lengths: tuple[float, ...]


def losses_along(
    loss: RobustLoss, trace: Trace, rays: Sequence[Ray], tick: Callable[[], None]
) -> tuple[float, list[list[float]]]:
    """R at the given weights and at every perturbation of every ray.

    Each batch is recorded once and then serves all rays, so memory holds the recorded outputs of one batch, and a
    perturbation costs only what lies behind its weight.

    Args:
        loss: what to measure.
        trace: of the same model.
        rays: what to try, one weight at a time.
        tick: called after each ray of each batch.

    Returns:
        The unperturbed loss, and for each ray one loss a length.

    Raises:
        UsageError: a loss is not finite.
    """
    frontiers = [trace.frontier(ray.target.weight) for ray in rays]
    keep = frozenset[int]().union(*frontiers)
    base = 0.0
    sums = [[0.0] * len(ray.lengths) for ray in rays]
    with torch.no_grad():
        for x, y in loss.batches():
            logits, recording = record(loss.model, trace, x, keep)
            base += finite(F.cross_entropy(logits, y, reduction="sum").item(), "at the given weights")
            for ray, frontier, row in zip(rays, frontiers, sums, strict=True):
                for position, length in enumerate(ray.lengths):
                    with exchanged(ray.target, ray.target.weight + length * ray.direction):
                        logits = replay(loss.model, trace, x, recording, frontier)
                    value = F.cross_entropy(logits, y, reduction="sum").item()
                    row[position] += finite(value, f"with {ray.target.name!r} perturbed by a norm of {length:.3g}")
                tick()
    count = len(loss.adv)
    return base / count, [[value / count for value in row] for row in sums]


def ascend(
    loss: RobustLoss,
    trace: Trace,
    target: Target,
    gradient: Tensor,
    radius: float,
    steps: int,
    cache_bytes: int,
    base: float,
) -> tuple[Tensor, float]:
    """Projected gradient ascent of R over perturbations of one weight with ‖Δ‖_F <= `radius`.

    The first iterate is the boundary point along `gradient`; each later one takes a step of length `radius` along the
    normalised gradient and projects back. Per step one forward and one backward over the set, both only through what
    lies behind the weight, as long as the inputs to that part fit into `cache_bytes` (batches beyond that are
    computed in full).

    Args:
        loss: what to maximise.
        trace: of the same model.
        target: whose weight moves.
        gradient: of R at the given weight; not zero.
        radius: of the ball, > 0.
        steps: most iterates, >= 1. The climb ends before that once `PLATEAU_STEPS` of them in a row raise the rise of
            the loss by less than `PLATEAU`.
        cache_bytes: limit on what is kept between the steps.
        base: R at the given weights.

    Returns:
        The best perturbation found and its loss.

    Raises:
        UsageError: a loss is not finite.
    """
    kept = _KeptBatches(loss, trace, trace.frontier(target.weight), cache_bytes)
    delta = radius * gradient / gradient.norm()
    best, best_loss, idle = delta, -math.inf, 0
    for step in range(steps):
        value, slope = _loss_and_slope(loss, kept, target, delta, step + 1 < steps)
        idle = 0 if value - base > (1 + PLATEAU) * max(best_loss - base, 0.0) else idle + 1
        if value > best_loss:
            best, best_loss = delta, value
        if slope is None or float(slope.norm()) == 0 or idle == PLATEAU_STEPS:
            break
        moved = delta + radius * slope / slope.norm()
        delta = moved * min(1.0, radius / max(float(moved.norm()), torch.finfo(moved.dtype).tiny))
    return best, best_loss


def _loss_and_slope(
    loss: RobustLoss, kept: _KeptBatches, target: Target, delta: Tensor, need_slope: bool
) -> tuple[float, Tensor | None]:
    total = 0.0
    slope = torch.zeros_like(delta) if need_slope else None
    moved = (target.weight.detach() + delta).requires_grad_(need_slope)
    for position, (x, y) in enumerate(loss.batches()):
        recording = kept.get(position, x)
        with exchanged(target, moved) as weight, torch.set_grad_enabled(need_slope):
            value = F.cross_entropy(kept.run(x, recording), y, reduction="sum")
        if slope is not None:
            slope += torch.autograd.grad(value, weight)[0]
        total += finite(value.item(), f"while ascending on {target.name!r}")
    return total / len(loss.adv), slope


class _KeptBatches:
    """Recordings of one weight's frontier, kept across passes while they fit into a budget."""

    def __init__(self, loss: RobustLoss, trace: Trace, frontier: frozenset[int], limit: int) -> None:
        self._model, self._trace, self._frontier, self._limit = loss.model, trace, frontier, limit
        self._held: dict[int, Recording] = {}
        self._bytes = 0

    def get(self, position: int, x: Tensor) -> Recording:
        """The recording of batch `position`; an empty one once the budget is spent."""
        held = self._held.get(position)
        if held is None:
            held = Recording()
            if self._frontier and self._bytes < self._limit:
                held = record(self._model, self._trace, x, self._frontier)[1]
                size = held.nbytes()
                if self._bytes + size > self._limit:
                    held, size = Recording(), self._limit - self._bytes
                self._bytes += size
            self._held[position] = held
        return held

    def run(self, x: Tensor, recording: Recording) -> Tensor:
        """The model's output with the recorded prefix."""
        return replay(self._model, self._trace, x, recording, self._frontier)


def finite(value: float, where: str) -> float:
    """`value`, if it is a finite number.

    Raises:
        UsageError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise UsageError(
            f"the robust loss is {value} {where}, so sensitivity cannot be measured. Check that the weights are "
            "finite and that the model expects images in [0, 1]; smaller radii help where only a perturbed loss fails."
        )
    return value
