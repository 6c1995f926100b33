"""The robust loss over the adversarial set, its weight gradients, and its value at perturbed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..console import track
from ..errors import UsageError
from ..models.layout import runs_in_bf16, weights_dtype
from ..runs.parts import Parts
from .adversarial_set import AdversarialSet
from .replay import Trace, record, replay
from .targets import Target, exchanged


@dataclass(frozen=True)
class RobustLoss:
    """R(theta): mean cross-entropy of `model` over a fixed adversarial set, in nats.

    Attributes:
        model: in eval mode and on `device`.
        adv: the adversarial set.
        batch_size: images in each batch.
        device: device on which to compute.
        layout: memory format of the images.
        bf16: whether passes run under bf16 autocast; the cross-entropy is computed in float32 or float64.
    """

    model: nn.Module
    adv: AdversarialSet
    batch_size: int
    device: torch.device
    layout: torch.memory_format = torch.contiguous_format
    bf16: bool = False

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, C, H, W] in the model's precision and labels [B], in order, on the device."""
        dtype = weights_dtype(self.model)
        for start in range(0, len(self.adv), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = self.adv.images[part].to(self.device, dtype)
            yield images.contiguous(memory_format=self.layout), self.adv.labels[part].to(self.device)

    def part(self, count: int) -> RobustLoss:
        """Return the loss over at most `count` images, the middle ones of `count` equal parts of the set."""
        if count >= len(self.adv):
            return self
        return self._of((2 * torch.arange(count) + 1) * len(self.adv) // (2 * count))

    @torch.no_grad()
    def stratified(self) -> RobustLoss:
        """Return the loss over the same images, sorted by class and within each class by loss.

        A `part` of it represents the classes and the losses of the set in proportion and does not depend on the order
        of the set (systematic sampling of an ordered population). Cost: one forward pass over the set.

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
        """Return the loss computed in bf16 where hardware and model support it and the weights are float32."""
        few = self.adv.images[:1].to(self.device)
        return replace(self, bf16=runs_in_bf16(self.model, few))

    def autocast(self) -> torch.autocast:
        """Return the autocast context of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    @property
    def num_batches(self) -> int:
        """Number of batches in one pass over the set."""
        return math.ceil(len(self.adv) / self.batch_size)

    @torch.no_grad()
    def value(self) -> float:
        """Return R at the current weights, in nats; it takes one forward pass over the set.

        Raises:
            UsageError: the loss is not finite.
        """
        total = 0.0
        for x, y in self.batches():
            with self.autocast():
                total += finite(cross_entropy_sum(self.model(x), y).item(), "at the given weights")
        return total / len(self.adv)

    def gradients(self, weights: Sequence[Tensor], tick: Callable[[], None]) -> tuple[float, list[Tensor | None]]:
        """Return R and its gradient with respect to each of `weights`, by one forward and backward pass over the set.

        Args:
            weights: parameters of the model that require gradients.
            tick: called after each batch.

        Returns:
            The loss in nats and the gradients; None for a weight on which the loss does not depend.

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
    """Return the cross-entropy [B] of each image, in nats; half-precision logits are converted to float32 first."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(wide, y, reduction="none")


def cross_entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the cross-entropy over the batch, in nats."""
    return cross_entropy(logits, y).sum()


@dataclass(frozen=True)
class LineSearch:
    """Perturbations of one weight along one direction.

    Attributes:
        target: the weight.
        direction: tensor of the weight's shape with unit Frobenius norm.
        lengths: Frobenius norms of the perturbations.
    """

    target: Target
    direction: Tensor
    lengths: tuple[float, ...]


def losses_along(
    loss: RobustLoss,
    trace: Trace,
    line_searches: Sequence[LineSearch],
    parts: Parts | None = None,
    name: str = "losses",
) -> tuple[float, list[list[float]]]:
    """Return R at the unperturbed weights and at every point of every line search, in nats.

    Each batch is recorded once for all line searches, so memory holds the recorded outputs of one batch, and a
    perturbation costs a forward pass only through the layers behind its weight.

    Args:
        loss: the robust loss.
        trace: trace of the same model.
        line_searches: perturbations to evaluate, one weight at a time.
        parts: where the sums so far are stored after each line search, and found again; by default nowhere.
        name: name of these parts, and of the losses in the progress line.

    Returns:
        The unperturbed loss, and for each line search one loss for each length.

    Raises:
        UsageError: a loss is not finite.
    """
    parts = parts or Parts()
    frontiers = [trace.frontier(line.target.weight) for line in line_searches]
    keep = frozenset[int]().union(*frontiers)
    lengths = [len(line.lengths) for line in line_searches]
    done, stored = parts.last(name, loss.num_batches * len(line_searches))
    base, *flat = stored["sums"].tolist() if done else [0.0] * (1 + sum(lengths))
    sums = [list(islice(flat, start - count, start)) for start, count in zip(accumulate(lengths), lengths, strict=True)]
    step, steps = 0, loss.num_batches * len(line_searches)
    with track(f"Sensitivity, {name}", steps, done) as advance, torch.no_grad(), loss.autocast():
        for x, y in loss.batches():
            if step + len(line_searches) <= done:
                step += len(line_searches)
                continue
            logits, recording = record(loss.model, trace, x, keep)
            if step >= done:
                base += finite(cross_entropy_sum(logits, y).item(), "at the given weights")
            for line, frontier, row in zip(line_searches, frontiers, sums, strict=True):
                step += 1
                if step <= done:
                    continue
                for position, length in enumerate(line.lengths):
                    with exchanged(line.target, line.target.weight + length * line.direction):
                        logits = replay(loss.model, trace, x, recording, frontier)
                    value = cross_entropy_sum(logits, y).item()
                    row[position] += finite(value, f"with {line.target.name!r} perturbed by a norm of {length:.3g}")
                parts.step(name, step, {"sums": torch.tensor([base, *chain(*sums)], dtype=torch.float64)})
                advance()
    count = len(loss.adv)
    return base / count, [[value / count for value in row] for row in sums]


def finite(value: float, where: str) -> float:
    """Return `value`, which must be finite.

    Args:
        value: a robust loss.
        where: place at which it was computed, for the message.

    Raises:
        UsageError: the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise UsageError(
            f"the robust loss is {value} {where}, so sensitivity cannot be measured. Check that the weights are "
            "finite and that the model expects images in [0, 1]; smaller radii help where only a perturbed loss fails."
        )
    return value
