"""Robust loss over the adversarial set, its weight gradients, and its value under perturbed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..models.layout import has_fast_bf16, weights_dtype
from .adversarial_set import AdversarialSet
from .replay import Trace, record, replay
from .targets import Target, exchanged


@dataclass(frozen=True)
class RobustLoss:
    """R(theta): mean cross-entropy of `model` over a fixed adversarial set, in nats.

    The model must be in eval mode and on `device`. Images come in `layout`. With `bf16`, passes run under autocast;
    the cross-entropy itself is always taken in single precision or better.
    """

    model: nn.Module
    adv: AdversarialSet
    batch_size: int
    device: torch.device
    layout: torch.memory_format = torch.contiguous_format
    bf16: bool = False

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images in the model's precision and labels, in order, on the device."""
        dtype = weights_dtype(self.model)
        for start in range(0, len(self.adv), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = self.adv.images[part].to(self.device, dtype)
            yield images.contiguous(memory_format=self.layout), self.adv.labels[part].to(self.device)

    def part(self, count: int) -> RobustLoss:
        """The same over at most `count` images: the middle ones of as many equal pieces of the set."""
        if count >= len(self.adv):
            return self
        return self._of((2 * torch.arange(count) + 1) * len(self.adv) // (2 * count))

    @torch.no_grad()
    def stratified(self) -> RobustLoss:
        """The same over the same images, in order of their class and within a class of their loss.

        A `part` of it has every class, and images of low and high loss, in the proportions of the set, and depends
        neither on the set's order nor on luck: systematic sampling of an ordered population. One forward over the set.

        Raises:
            UsageError: the loss is not finite.
        """
        quick, parts = self.fast(), []
        for x, y in quick.batches():
            with quick.autocast():
                parts.append(cross_entropy(self.model(x), y))
        each = torch.cat(parts).cpu()
        finite(float(each.sum()), "at the given weights")
        by_loss = each.argsort(stable=True)
        return self._of(by_loss[self.adv.labels[by_loss].argsort(stable=True)])

    def _of(self, chosen: Tensor) -> RobustLoss:
        return replace(self, adv=replace(self.adv, images=self.adv.images[chosen], labels=self.adv.labels[chosen]))

    def fast(self) -> RobustLoss:
        """The same in bf16, where the hardware has it and the weights are single precision."""
        single = weights_dtype(self.model) == torch.float32
        return replace(self, bf16=single and has_fast_bf16(self.device))

    def autocast(self) -> torch.autocast:
        """The context in which passes run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    @property
    def num_batches(self) -> int:
        """Number of batches of one pass."""
        return math.ceil(len(self.adv) / self.batch_size)

    @torch.no_grad()
    def value(self) -> float:
        """R at the present weights: one forward over the set.

        Raises:
            UsageError: it is not finite.
        """
        total = 0.0
        for x, y in self.batches():
            with self.autocast():
                total += finite(cross_entropy_sum(self.model(x), y).item(), "at the given weights")
        return total / len(self.adv)

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
            with torch.enable_grad(), self.autocast():
                loss = cross_entropy_sum(self.model(x), y)
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


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image in nats, shape (B,); half-precision logits are widened first."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(wide, y, reduction="none")


def cross_entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """Summed cross-entropy in nats."""
    return cross_entropy(logits, y).sum()


@dataclass(frozen=True)
class LineSearch:
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
    loss: RobustLoss, trace: Trace, line_searches: Sequence[LineSearch], tick: Callable[[], None]
) -> tuple[float, list[list[float]]]:
    """R at the given weights and at every point of every line search.

    Each batch is recorded once and then serves all line searches, so memory holds the recorded outputs of one batch,
    and a perturbation costs only what lies behind its weight.

    Args:
        loss: what to measure.
        trace: of the same model.
        line_searches: what to try, one weight at a time.
        tick: called after each line search of each batch.

    Returns:
        The unperturbed loss, and for each line search one loss a length.

    Raises:
        UsageError: a loss is not finite.
    """
    frontiers = [trace.frontier(line.target.weight) for line in line_searches]
    keep = frozenset[int]().union(*frontiers)
    base = 0.0
    sums = [[0.0] * len(line.lengths) for line in line_searches]
    with torch.no_grad(), loss.autocast():
        for x, y in loss.batches():
            logits, recording = record(loss.model, trace, x, keep)
            base += finite(cross_entropy_sum(logits, y).item(), "at the given weights")
            for line, frontier, row in zip(line_searches, frontiers, sums, strict=True):
                for position, length in enumerate(line.lengths):
                    with exchanged(line.target, line.target.weight + length * line.direction):
                        logits = replay(loss.model, trace, x, recording, frontier)
                    value = cross_entropy_sum(logits, y).item()
                    row[position] += finite(value, f"with {line.target.name!r} perturbed by a norm of {length:.3g}")
                tick()
    count = len(loss.adv)
    return base / count, [[value / count for value in row] for row in sums]


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
