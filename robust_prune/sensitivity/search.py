"""The search for the perturbation of each weight that raises the robust loss most, on as few images as will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..console import track
from .ascent import ascend
from .losses import RobustLoss
from .recordings import Recordings, bytes_an_image
from .replay import Trace
from .starts import shortlist
from .targets import Target


@dataclass(frozen=True)
class Effort:
    """How long to search on few images: first the starts are compared, then the best goes on.

    Attributes:
        start_images: images that starts are made and compared on.
        starts: how many of them a target are climbed from.
        start_steps: iterates of each of these climbs.
        images: images that the best one goes on with.
        steps: iterates there.
    """

    start_images: int
    starts: int
    start_steps: int
    images: int
    steps: int


SHORT = Effort(start_images=32, starts=3, start_steps=2, images=64, steps=3)
LONG = Effort(start_images=128, starts=4, start_steps=5, images=128, steps=4)


def find_directions(
    loss: RobustLoss,
    trace: Trace,
    live: Sequence[tuple[Target, Tensor]],
    rho: float,
    effort: Effort,
    whole_steps: int,
    memory_bytes: int,
    others: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The steepest direction found for each target.

    Args:
        loss: what to raise, over the whole set.
        trace: of the same model.
        live: distinct weights, each with its gradient, which is not zero.
        rho: relative radius of the balls, > 0.
        effort: how long to search on parts of the set.
        whole_steps: most iterates on the whole set after that; 0 for none.
        memory_bytes: limit on the recordings kept for the ascents.
        others: for each target one more direction, to be compared with the best start and gone on with if it is better.

    Returns:
        A direction a target, unit Frobenius norm.

    Raises:
        UsageError: a loss is not finite.
    """
    if not live:
        return []
    targets, gradients = [target for target, _ in live], [gradient for _, gradient in live]
    few, part = loss.part(effort.start_images), loss.part(effort.images)
    stages = [(few, effort.start_steps), (part, effort.steps)]
    if whole_steps:
        stages.append((loss, whole_steps))
    bases = [stage.value() for stage, _ in stages]
    weights = [target.weight for target in targets]
    recorders = [_recorder(stage, trace, weights, memory_bytes // len(stages)) for stage, _ in stages]
    found = []
    starts = shortlist(few, trace, targets, gradients, rho, effort.starts)
    with track("Sensitivity, directions", len(live)) as advance:
        for position, (target, directions) in enumerate(zip(targets, starts, strict=True)):
            radius = rho * float(target.weight.detach().norm())
            for number, ((_, steps), recorder, base) in enumerate(zip(stages, recorders, bases, strict=True)):
                if number == 1 and others:
                    directions = [*directions, others[position]]
                directions = [ascend(recorder(target.weight), target, directions, radius, steps, base)]
            found += directions
            advance()
    return found


def _recorder(
    stage: RobustLoss, trace: Trace, weights: Sequence[nn.Parameter], limit: int
) -> Callable[[nn.Parameter], Recordings]:
    """What gives the recordings for one weight: the same ones for all, where they fit, or new ones for each."""
    if bytes_an_image(stage, trace, weights) * len(stage.adv) > limit:
        return lambda weight: Recordings(stage, trace, [weight], limit)
    shared = Recordings(stage, trace, weights, limit)
    return lambda _: shared
