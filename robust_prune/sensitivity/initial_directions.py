"""Where to begin the search for the perturbation of one weight that raises the robust loss most.

The loss in a ball around a trained weight has several maxima, up to fourfold apart in height. At the high ones the
network gives most images one and the same class, another at another maximum. Near the centre the gradient says little
about them; it is almost zero, and an ascent along it ends in whichever is nearest.

So we start once towards each class, and once along the gradient. Moving one weight towards a class at the centre shows
only what is linear there. Moving *all* weights together, each by a small share of its ball, reaches a network that
does give one class, where each weight's gradient says how it best takes part in that: the same maximum, seen from
inside. Such a joint climb costs no more for all weights than a step of an ascent costs for one at the first layer.

The loss right there does not tell which initial direction leads highest: the best one may be the lowest. Its slope
tells more. So every weight takes one step from each of them, and those that promise most are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ..console import track
from .losses import RobustLoss
from .targets import Target, exchanged

JOINT_SHARE = 0.2
"""How far into its ball each weight goes in a joint climb. All move at once: more leaves what single weights reach."""

JOINT_STEPS = 2
CLASSES = 10
"""Most classes to start towards: those to which the model gives most probability on the images of the search."""

ALIKE = 0.8
"""Cosine from which on two directions count as one."""


def shortlist(
    loss: RobustLoss,
    targets: Sequence[Target],
    gradients: Sequence[Tensor],
    rho: float,
    count: int,
    step: Callable[[int, Tensor], tuple[Tensor, float]],
) -> list[list[Tensor]]:
    """The most promising initial directions of each target, one step on, best first.

    For each initial direction, `JOINT_STEPS` + 1 forwards and backwards over the set, and one step a target. Memory:
    `count` + 5 copies of the targets' weights.

    Args:
        loss: what to raise, over few images.
        targets: distinct weights.
        gradients: of R with respect to each, not zero.
        rho: relative radius of the balls, > 0.
        count: most initial directions a target, >= 1.
        step: from the position of a target and a direction to the next direction, and how high that leads.

    Returns:
        For each target 1 to `count` directions of unit Frobenius norm, no two of them alike.

    Raises:
        UsageError: a loss is not finite.
    """
    best: list[list[tuple[float, Tensor]]] = [[] for _ in targets]
    lengths = [rho * float(target.weight.detach().norm()) for target in targets]
    labels = (None, *_likely_classes(loss))
    with track("Sensitivity, initial directions", len(labels) * len(targets)) as advance:
        for label in labels:
            directions = _joint_climb(loss, targets, gradients, lengths, label)
            for position, (held, direction) in enumerate(zip(best, directions, strict=True)):
                following, promise = step(position, direction)
                keep(held, promise, following, count)
                advance()
    return [[direction for _, direction in held] for held in best]


def unit(direction: Tensor) -> Tensor:
    """`direction`, not zero, scaled to Frobenius norm 1."""
    return direction / direction.norm()


def keep(held: list[tuple[float, Tensor]], value: float, direction: Tensor, count: int) -> None:
    """Puts a direction among the `count` best ones; of two that are alike the better one stays."""
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
    """One direction a target from the climb of all targets together, begun towards a class or along the gradients."""
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
    """Unit gradients where every target has moved along its direction; the direction itself where one vanishes."""
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
