"""The search for the perturbation of each weight that raises the robust loss most, on as few images as will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..console import track
from .ascent import ascend, first_step
from .initial_directions import shortlist
from .losses import RobustLoss
from .recordings import Recordings, bytes_an_image
from .replay import Trace
from .targets import Target


@dataclass(frozen=True)
class SearchBudget:
    """How long to search on few images: directions are made, the best compared, and the best of these climbs on.

    Attributes:
        initial_images: images on which initial directions are made and take their first step.
        initial_directions: how many of them are compared for each target.
        compare_images: images that they are compared on.
        compare_steps: iterates of an ascent from each of them there.
        images: images that the best one goes on with.
        steps: iterates there.
    """

    initial_images: int
    initial_directions: int
    compare_images: int
    compare_steps: int
    images: int
    steps: int


# Multiples of ten: of ten classes, parts of a stratified set then have as many images each, and no initial direction
# towards one of them is favoured by chance.
SHORT = SearchBudget(initial_images=20, initial_directions=3, compare_images=30, compare_steps=1, images=60, steps=3)
LONG = SearchBudget(initial_images=60, initial_directions=4, compare_images=120, compare_steps=5, images=120, steps=4)


def find_directions(
    loss: RobustLoss,
    trace: Trace,
    live: Sequence[tuple[Target, Tensor]],
    rho: float,
    search_budget: SearchBudget,
    whole_steps: int,
    memory_bytes: int,
    others: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The steepest direction found for each target.

    Args:
        loss: what to raise, over the whole set; parts of it should represent it, see `RobustLoss.stratified`.
        trace: of the same model.
        live: distinct weights, each with its gradient, which is not zero.
        rho: relative radius of the balls, > 0.
        search_budget: how long to search on parts of the set.
        whole_steps: most iterates on the whole set after that; 0 for none.
        memory_bytes: limit on the recordings kept for the ascents.
        others: for each target one more direction, to be compared with the best initial direction, and taken
            if it is better.

    Returns:
        A direction a target, unit Frobenius norm.

    Raises:
        UsageError: a loss is not finite.
    """
    if not live:
        return []
    targets, gradients = [target for target, _ in live], [gradient for _, gradient in live]
    weights = [target.weight for target in targets]
    radii = [rho * float(weight.detach().norm()) for weight in weights]
    few = loss.part(search_budget.initial_images)
    stages = [
        (loss.part(search_budget.compare_images), search_budget.compare_steps),
        (loss.part(search_budget.images), search_budget.steps),
    ]
    if whole_steps:
        stages.append((loss, whole_steps))
    limit = memory_bytes // (len(stages) + 1)

    first = _recorder(few, trace, weights, limit)
    starts = shortlist(
        few,
        targets,
        gradients,
        rho,
        search_budget.initial_directions,
        lambda i, start: first_step(first(weights[i]), targets[i], start, radii[i]),
    )
    bases = [stage.value() for stage, _ in stages]
    recorders = [_recorder(stage, trace, weights, limit) for stage, _ in stages]
    found = []
    with track("Sensitivity, directions", len(live)) as advance:
        for position, (target, directions) in enumerate(zip(targets, starts, strict=True)):
            for number, ((_, steps), recorder, base) in enumerate(zip(stages, recorders, bases, strict=True)):
                if number == 1 and others:
                    directions = [*directions, others[position]]
                directions = [ascend(recorder(target.weight), target, directions, radii[position], steps, base)]
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
