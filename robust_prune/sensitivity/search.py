"""Search on few images for the perturbation of each weight that raises the robust loss most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..console import track
from ..runs.parts import Parts
from .ascent import ascend, first_step
from .initial_directions import shortlist
from .losses import RobustLoss
from .recordings import Recordings, bytes_an_image
from .replay import Trace
from .targets import Target


@dataclass(frozen=True)
class SearchBudget:
    """Images and steps of the three stages of a search: initial directions, their comparison, and ascent from the best.

    Attributes:
        initial_images: images on which initial directions are found and take their first step.
        initial_directions: initial directions of each target that are compared.
        compare_images: images on which they are compared.
        compare_steps: iterates of the ascent from each initial direction in the comparison.
        images: images of the ascent from the best direction.
        steps: iterates of that ascent.
    """

    initial_images: int
    initial_directions: int
    compare_images: int
    compare_steps: int
    images: int
    steps: int


# Multiples of ten give each of ten classes the same number of images in a stratified part, so that no initial direction
# towards a class is favoured by chance.
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
    parts: Parts | None = None,
) -> list[Tensor]:
    """Return for each target the direction of the largest loss found on the ball.

    Args:
        loss: robust loss over the full set, sorted so that parts of it are representative (`RobustLoss.stratified`).
        trace: trace of the same model.
        live: distinct weights, each with its gradient, which is not zero.
        rho: relative radius of the balls, > 0.
        search_budget: images and steps of the search on parts of the set.
        whole_steps: largest number of iterates on the full set after that; 0 for none.
        memory_bytes: limit on the recordings kept for the ascents, in bytes.
        others: for each target an additional starting direction of the ascent that follows the comparison.
        parts: where the directions found so far are stored, and found again; by default nowhere.

    Returns:
        For each target a direction of unit Frobenius norm.

    Raises:
        UsageError: a loss is not finite.
    """
    if not live:
        return []
    parts, name = parts or Parts(), f"directions of {search_budget.images} images"
    known = [parts.get(f"{name}, {position}") for position in range(len(live))]
    found = [part["direction"].to(t.weight) for part, (t, _) in zip(known, live, strict=True) if part is not None]
    if len(found) == len(live):
        return found
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
        parts,
        f"{name}, initial",
    )
    bases = [stage.value() for stage, _ in stages]
    recorders = [_recorder(stage, trace, weights, limit) for stage, _ in stages]
    found = []
    with track("Sensitivity, directions", len(live)) as advance:
        for position, (target, directions) in enumerate(zip(targets, starts, strict=True)):
            earlier = known[position]
            if earlier is not None:
                directions = [earlier["direction"].to(target.weight)]
            else:
                for number, ((_, steps), recorder, base) in enumerate(zip(stages, recorders, bases, strict=True)):
                    if number == 1 and others:
                        directions = [*directions, others[position]]
                    ascent = ascend(recorder(target.weight), target, directions, radii[position], steps, base)
                    directions = [ascent.contiguous()]
                parts.put(f"{name}, {position}", {"direction": directions[0]})
            found += directions
            advance()
    return found


def _recorder(
    stage: RobustLoss, trace: Trace, weights: Sequence[nn.Parameter], limit: int
) -> Callable[[nn.Parameter], Recordings]:
    """Return a function from a weight to its recordings: shared by all weights if they fit, else new for each."""
    if bytes_an_image(stage, trace, weights) * len(stage.adv) > limit:
        return lambda weight: Recordings(stage, trace, [weight], limit)
    shared = Recordings(stage, trace, weights, limit)
    return lambda _: shared
