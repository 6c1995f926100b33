"""Initial directions of the search for the perturbation of one weight that raises the robust loss most.

The loss in a ball around a trained weight has several local maxima, whose heights differ by up to a factor of four. At
the high ones the network assigns most images to one class, which differs between the maxima. Near the centre the
gradient is almost zero and carries little information about them, and an ascent along it ends in the nearest maximum.

The search therefore starts once towards each of the likeliest classes and once along the gradient. Moving a single
weight towards a class shows only the linear part of the loss. Moving *all* weights jointly, each by a small share of
its radius, reaches a network that predicts one class, and the gradient of each weight there points to its
contribution. One joint step for all weights costs as much as one ascent step for a weight of the first layer.

The loss at an initial direction does not predict the maximum to which it leads, but the gradient there helps. Every
weight therefore takes one step from each initial direction, and the directions with the highest first-order estimates
are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ..console import track
from ..runs.parts import Parts
from .losses import RobustLoss
from .targets import Target, exchanged

JOINT_SHARE = 0.2
"""Share of its radius by which each weight moves in a joint ascent; a single weight cannot follow larger shares."""

JOINT_STEPS = 2
CLASSES = 10
"""Number of target classes: those to which the model assigns most probability on the images of the search."""

ALIKE = 0.8
"""Cosine similarity above which two directions count as the same."""


def shortlist(
    loss: RobustLoss,
    targets: Sequence[Target],
    gradients: Sequence[Tensor],
    rho: float,
    count: int,
    step: Callable[[int, Tensor], tuple[Tensor, float]],
    parts: Parts | None = None,
    name: str = "initial directions",
) -> list[list[Tensor]]:
    """Return the most promising initial directions of each target after one step, best first.

    Cost of each initial direction: `JOINT_STEPS` + 1 forward and backward passes over the set and one `step` for each
    target. Memory: `count` + 5 copies of the targets' weights.

    Args:
        loss: robust loss to raise, over few images.
        targets: distinct weights.
        gradients: gradient of R with respect to each weight, not zero.
        rho: relative radius of the balls, > 0.
        count: largest number of directions of each target, >= 1.
        step: maps the index of a target and a direction to the next direction and an estimate of the loss there.
        parts: where the best directions so far are stored after each initial direction, and found again; by default
            nowhere.
        name: name of these parts.

    Returns:
        For each target 1 to `count` directions of unit Frobenius norm, no two of them with a cosine similarity above
        `ALIKE`.

    Raises:
        UsageError: a loss is not finite.
    """
    parts = parts or Parts()
    lengths = [rho * float(target.weight.detach().norm()) for target in targets]
    labels = (None, *_likely_classes(loss))
    done, stored = parts.last(name, len(labels))
    best = [_unpacked(stored, position, target) for position, target in enumerate(targets)]
    with track("Sensitivity, initial directions", len(labels) * len(targets), done * len(targets)) as advance:
        for number, label in enumerate(labels[done:], start=done + 1):
            directions = _joint_climb(loss, targets, gradients, lengths, label)
            for position, (held, direction) in enumerate(zip(best, directions, strict=True)):
                following, promise = step(position, direction)
                # What is stored loses its strides, with which sums end in other last bits.
                keep(held, promise, following.contiguous(), count)
                advance()
            parts.step(name, number, {k: v for position, held in enumerate(best) for k, v in _packed(held, position)})
    return [[direction for _, direction in held] for held in best]


Held = list[tuple[float, Tensor]]
"""Estimates of the loss and directions of one target, best first."""


def _packed(held: Held, position: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the directions of a target and their estimates as named tensors; `_unpacked` reverses it."""
    yield f"{position}", torch.tensor([value for value, _ in held], dtype=torch.float64)
    for rank, (_, direction) in enumerate(held):
        yield f"{position}.{rank}", direction


def _unpacked(stored: Mapping[str, Tensor], position: int, target: Target) -> Held:
    values = stored[f"{position}"].tolist() if stored else []
    return [(value, stored[f"{position}.{rank}"].to(target.weight)) for rank, value in enumerate(values)]


def unit(direction: Tensor) -> Tensor:
    """Return `direction`, which is not zero, scaled to unit Frobenius norm."""
    return direction / direction.norm()


def keep(held: Held, value: float, direction: Tensor, count: int) -> None:
    """Insert a direction into the `count` best ones, in place; of two similar directions the better one is kept."""
    alike = [float((other * direction).sum()) > ALIKE for _, other in held]
    if any(same and pair[0] >= value for pair, same in zip(held, alike, strict=True)):
        return
    others = [pair for pair, same in zip(held, alike, strict=True) if not same]
    held[:] = sorted([*others, (value, direction)], key=lambda pair: -pair[0])[:count]


def _joint_climb(
    loss: RobustLoss,
    targets: Sequence[Target],
    gradients: Sequence[Tensor],
    lengths: Sequence[float],
    label: int | None,
) -> list[Tensor]:
    """Return a direction for each target from a joint ascent of all, towards class `label` or along the gradients."""
    directions = [unit(gradient) for gradient in gradients]
    if label is not None:
        towards = replace(loss, adv=replace(loss.adv, labels=torch.full_like(loss.adv.labels, label)))
        downhill = _gradients_at(towards, targets, [-d for d in directions], [0.0] * len(targets))
        directions = [-d for d in downhill]
    for _ in range(JOINT_STEPS):
        directions = _gradients_at(loss, targets, directions, [JOINT_SHARE * length for length in lengths])
    return directions


def _gradients_at(
    loss: RobustLoss, targets: Sequence[Target], directions: Sequence[Tensor], lengths: Sequence[float]
) -> list[Tensor]:
    """Return unit gradients at targets moved along their directions, or the direction where a gradient vanishes."""
    with ExitStack() as stack:
        moved = [
            stack.enter_context(exchanged(t, (t.weight.detach() + length * d).requires_grad_(True)))
            for t, d, length in zip(targets, directions, lengths, strict=True)
        ]
        found = loss.gradients(moved, lambda: None)[1]
    return [
        old if new is None or float(new.norm()) == 0 else unit(new) for old, new in zip(directions, found, strict=True)
    ]


@torch.no_grad()
def _likely_classes(loss: RobustLoss) -> list[int]:
    total = None
    for x, _ in loss.batches():
        with loss.autocast():
            share = loss.model(x).float().softmax(1).sum(0)
        total = share if total is None else total + share
    assert total is not None
    return total.topk(min(CLASSES, len(total))).indices.tolist()
