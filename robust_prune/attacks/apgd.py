"""Auto-PGD (Croce & Hein, 2020, arXiv 2003.01690): projected gradient ascent whose step size looks after itself."""

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
"""Into so many sizes a batch shrinks while images fall: few shapes to compile or to tune for."""


# Ten parameters: those of `pgd` that apply, and the loss; callers set three or four.
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
) -> Tensor:
    """Adversarial images by APGD, with the parameters of the paper.

    An image leaves the attack as soon as it is misclassified. Cost per image: at most ``restarts * (steps + 1)``
    forwards and backwards; one more forward by `judge`, if there is one, for each iterate that looks misclassified.
    The caller chooses eval mode and freezes parameters (`frozen_eval`).

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; may run in lower precision.
        x: images in [0, 1].
        y: labels [N].
        threat: norm and radius.
        loss: ``ce``, cross-entropy, or ``dlr``, the difference of logits ratio (three classes or more).
        target: classes [N] to attack towards, with ``dlr`` only; the plain difference of the two logits takes the
            ratio's place with fewer than four classes.
        steps: gradient steps of each restart.
        restarts: independent random starts.
        generator: source of the random starts.
        judge: logits that decide whether an image is misclassified, in full precision where `model` is not; `model`
            itself by default.

    Returns:
        Images [N, C, H, W] inside the epsilon-ball around `x` and inside [0, 1]: misclassified ones where the attack
        succeeded, the iterates of the highest loss elsewhere.

    Raises:
        UsageError: an unknown loss, a target with ``ce``, too few classes, or a count below 1.
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
        found = _one_run(model, x[rows], y[rows], goal, threat, loss, steps, generator, judge)
        better = found.fallen | (found.value > values[rows])
        points[rows[better]] = found.point[better]
        values[rows[better]] = found.value[better]
        standing[rows] = ~found.fallen
    return points


@dataclass
class _Outcome:
    """What one run found: a point an image, its loss, and whether it is misclassified."""

    point: Tensor
    value: Tensor
    fallen: Tensor


@dataclass
class _Climb:
    """One run's state, a row an image that is still in it.

    Attributes:
        row: position in the batch.
        x, y, target: what is attacked; the target is the label where there is none.
        here, before: this iterate and the last one.
        slope, value: gradient and loss at `here`.
        best, best_slope, best_value: at the best iterate.
        step: step size in pixel units, [N, 1, 1, 1].
        rises: in how many steps since the last checkpoint the loss rose.
        best_then: `best_value` at the last checkpoint.
        halved: whether the step size was halved there.
        fallen: misclassified.
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
        """The state of some of the images."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})


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
) -> _Outcome:
    def look(here: Tensor, y: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wrong = torch.zeros_like(y, dtype=torch.bool)

        def objective(logits: Tensor) -> Tensor:
            wrong.copy_(misclassified(logits.detach(), y))
            return _value(logits, y, None if target is None else goal, loss)

        slope, value = input_gradient(model, here, objective)
        suspects = wrong.nonzero().flatten()
        if judge is not None and len(suspects):
            with torch.no_grad():
                wrong[suspects] = misclassified(judge(here[suspects]), y[suspects])
        # A loss that is not a number would lose every comparison, although the model fails there.
        return slope.nan_to_num(nan=0.0), value.nan_to_num(nan=torch.inf), wrong

    goal = y if target is None else target
    here = project(random_start(x, threat, generator), x, threat)
    slope, value, fallen = look(here, y, goal)
    step = torch.full((len(x), *[1] * (x.ndim - 1)), FIRST_STEP * threat.epsilon, dtype=x.dtype, device=x.device)
    state = _Climb(
        torch.arange(len(x), device=x.device), x, y, goal, here, here, slope, value, here, slope, value, step,
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
        slope, value, wrong = look(ahead, state.y, state.target)
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
    """Keeps the best iterates, and the first misclassified one of each image."""
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
    """Halves the step where the loss rose too rarely or the best has not moved, and goes back to the best iterate."""
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
    """Without the images that have fallen, filled up with some of them to a multiple of an eighth of the batch."""
    bucket = math.ceil(full / BUCKETS)
    wanted = bucket * math.ceil(int((~state.fallen).sum()) / bucket)
    if wanted >= len(state.row):
        return state
    return state.take(state.fallen.int().argsort(stable=True)[:wanted])
