"""Auto-PGD (Croce & Hein, 2020, arXiv 2003.01690): projected gradient ascent with adaptive step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .objectives import (
    DLR_CLASSES,
    TARGETED_DLR_CLASSES,
    Watch,
    cross_entropy,
    dlr,
    misclassified,
    targeted_dlr,
    targeted_margin,
)
from .pgd import input_gradient
from .projections import ascent_step, per_sample, project, random_start
from .threat import ThreatModel

Loss = Literal["ce", "dlr"]
Judge = Callable[[Tensor], Tensor]

FIRST_STEP = 2.0
MOMENTUM = 0.75
LEAST_RISES = 0.75
FIRST_WINDOW, SHORTENING, LEAST_WINDOW = 0.22, 0.03, 0.06
BUCKETS = 8
"""Number of batch sizes that occur as attacked images leave the batch; few shapes need compiling and autotuning."""


# More than eight parameters: those of `pgd` that apply here, and the loss.
def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    loss: Loss = "ce",
    target: Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    judge: Judge | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return adversarial images found by APGD with the hyperparameters of the paper.

    An image leaves the attack as soon as it is misclassified. Cost per image: at most ``restarts * (steps + 1)``
    forward and backward passes, and one more forward pass of `judge`, if given, for each iterate that `model`
    misclassifies. The caller sets eval mode and freezes the parameters (`frozen_eval`).

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; may run in lower precision.
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        threat: norm and radius.
        loss: ``ce`` (cross-entropy) or ``dlr`` (difference of logits ratio; needs three classes).
        target: target classes [N] of the targeted DLR loss; requires ``dlr``. With fewer than four classes the
            difference of the two logits replaces the ratio.
        steps: gradient steps of each restart, at least 1.
        restarts: number of random restarts, at least 1.
        generator: random number generator of the restarts.
        judge: model in full precision that confirms each misclassification by `model`, images to logits [N, K]; by
            default `model` decides alone.
        watch: is told every iterate, for instance to ask another model; it has no effect on the attack.

    Returns:
        Images [N, C, H, W] in the epsilon-ball around `x` and in [0, 1]: the misclassified iterate where the attack
        succeeded, the iterate with the highest loss elsewhere.

    Raises:
        UsageError: the loss is unknown, a target is given with ``ce``, untargeted ``dlr`` has fewer than three
            classes, or `steps` or `restarts` is below 1.
    """
    if loss not in ("ce", "dlr") or (loss == "ce" and target is not None):
        raise UsageError(f"APGD knows the losses ce, dlr and dlr with a target, got {loss!r}")
    if steps < 1 or restarts < 1:
        raise UsageError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
    points = x.detach().clone()
    values = torch.full((len(x),), -torch.inf, device=x.device)
    standing = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(restarts):
        rows = standing.nonzero().flatten()
        if len(rows) == 0:
            break
        goal = None if target is None else target[rows]
        seen = None if watch is None else _of_rows(watch, rows)
        found = _one_run(model, x[rows], y[rows], goal, threat, loss, steps, generator, judge, seen)
        better = found.fallen | (found.value > values[rows])
        points[rows[better]] = found.point[better]
        values[rows[better]] = found.value[better]
        standing[rows] = ~found.fallen
    return points


def _of_rows(watch: Watch, rows: Tensor) -> Watch:
    """Return `watch` for positions in a part of the batch, which is at `rows` of the whole."""
    return lambda points, among: watch(points, rows[among])


@dataclass
class _Outcome:
    """Result of one restart; for each image a point, its loss and whether it is misclassified."""

    point: Tensor
    value: Tensor
    fallen: Tensor


@dataclass
class _Climb:
    """State of one APGD restart; one row for each image that is still being attacked.

    Attributes:
        row: position of the image in the batch.
        x, y, target: image, label and target class; for an untargeted attack the target equals the label.
        here, before: current and previous iterate.
        slope, value: gradient and loss at the current iterate.
        best, best_slope, best_value: the iterate with the highest loss so far, its gradient and its loss.
        step: step size in pixel units, [N, 1, 1, 1].
        rises: number of steps since the last checkpoint that increased the loss.
        best_then: `best_value` at the last checkpoint.
        halved: whether the last checkpoint halved the step size.
        fallen: whether an iterate has been misclassified.
    """

    row: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    here: Tensor
    before: Tensor
    slope: Tensor
    value: Tensor
    best: Tensor
    best_slope: Tensor
    best_value: Tensor
    step: Tensor
    rises: Tensor
    best_then: Tensor
    halved: Tensor
    fallen: Tensor

    def take(self, rows: Tensor) -> _Climb:
        """Return the state of the given rows."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})


# More than eight parameters: those of `apgd`, for one restart.
def _one_run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    threat: ThreatModel,
    loss: Loss,
    steps: int,
    generator: torch.Generator | None,
    judge: Judge | None,
    watch: Watch | None,
) -> _Outcome:
    def look(here: Tensor, y: Tensor, goal: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if watch is not None:
            watch(here, row)
        wrong = torch.zeros_like(y, dtype=torch.bool)

        def objective(logits: Tensor) -> Tensor:
            wrong.copy_(misclassified(logits.detach(), y))
            return _value(logits, y, None if target is None else goal, loss)

        slope, value = input_gradient(model, here, objective)
        suspects = wrong.nonzero().flatten()
        if judge is not None and len(suspects):
            with torch.no_grad():
                wrong[suspects] = misclassified(judge(here[suspects]), y[suspects])
        # NaN compares false with every loss, so the iterate where the model breaks down would never count as the best.
        return slope.nan_to_num(nan=0.0), value.nan_to_num(nan=torch.inf), wrong

    goal = y if target is None else target
    here = project(random_start(x, threat, generator), x, threat)
    row = torch.arange(len(x), device=x.device)
    slope, value, fallen = look(here, y, goal, row)
    step = torch.full((len(x), *[1] * (x.ndim - 1)), FIRST_STEP * threat.epsilon, dtype=x.dtype, device=x.device)
    state = _Climb(
        row, x, y, goal, here, here, slope, value, here, slope, value, step,
        torch.zeros_like(value), value, torch.ones_like(fallen), fallen,
    )  # fmt: skip
    result = _Outcome(here.clone(), value.clone(), fallen.clone())
    window = since = max(round(FIRST_WINDOW * steps), 1)
    for index in range(steps):
        state = _smaller(state, len(x))
        if bool(state.fallen.all()):
            break
        momentum = MOMENTUM if index else 1.0
        ahead = project(ascent_step(state.here, state.slope, state.step, threat), state.x, threat)
        ahead = state.here + momentum * (ahead - state.here) + (1 - momentum) * (state.here - state.before)
        ahead = project(ahead, state.x, threat)
        slope, value, wrong = look(ahead, state.y, state.target, state.row)
        state.rises = state.rises + (value > state.value)
        state.before, state.here, state.slope, state.value = state.here, ahead, slope, value
        _note(state, result, wrong)
        since -= 1
        if since == 0:
            _checkpoint(state, window)
            window = since = max(window - max(int(SHORTENING * steps), 1), max(int(LEAST_WINDOW * steps), 1))
    return result


def _value(logits: Tensor, y: Tensor, target: Tensor | None, loss: Loss) -> Tensor:
    classes = logits.shape[1]
    if loss == "ce":
        return cross_entropy(logits, y)
    if target is not None:
        ratio = targeted_dlr if classes >= TARGETED_DLR_CLASSES else targeted_margin
        return ratio(logits, y, target)
    if classes < DLR_CLASSES:
        raise UsageError(f"the DLR loss needs at least {DLR_CLASSES} classes, the model has {classes}. Use ce.")
    return dlr(logits, y)


def _note(state: _Climb, result: _Outcome, wrong: Tensor) -> None:
    """Update the best iterate and records the first misclassified iterate of each image."""
    better = state.value > state.best_value
    mask = per_sample(better, state.here)
    state.best = torch.where(mask, state.here, state.best)
    state.best_slope = torch.where(mask, state.slope, state.best_slope)
    state.best_value = torch.where(better, state.value, state.best_value)
    falls = wrong & ~state.fallen
    kept = falls | (better & ~state.fallen)
    rows = state.row[kept]
    result.point[rows], result.value[rows] = state.here[kept], state.value[kept]
    result.fallen[state.row[falls]] = True
    state.fallen = state.fallen | falls


def _checkpoint(state: _Climb, window: int) -> None:
    """Halve the step size where the loss rose too rarely or stagnated, and restart there from the best iterate."""
    stuck = ~state.halved & (state.best_then >= state.best_value)
    halve = (state.rises <= LEAST_RISES * window) | stuck
    mask = per_sample(halve, state.here)
    state.step = torch.where(mask, state.step / 2, state.step)
    state.here = torch.where(mask, state.best, state.here)
    state.slope = torch.where(mask, state.best_slope, state.slope)
    state.value = torch.where(halve, state.best_value, state.value)
    state.halved, state.best_then = halve, state.best_value
    state.rises = torch.zeros_like(state.rises)


def _smaller(state: _Climb, full: int) -> _Climb:
    """Drop misclassified images, keeping just enough of them for a multiple of an eighth of the batch."""
    bucket = math.ceil(full / BUCKETS)
    wanted = bucket * math.ceil(int((~state.fallen).sum()) / bucket)
    if wanted >= len(state.row):
        return state
    return state.take(state.fallen.int().argsort(stable=True)[:wanted])
