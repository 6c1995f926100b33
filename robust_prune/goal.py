"""The smallest model that keeps a wanted robust accuracy: a search over ratios, judged on held-out training images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from . import distributed
from .bench.latency import check_section
from .compression import compress, open_run, recover
from .console import console, warn, working
from .data.base import ImageSet, Subset, labels_of, stratified, stratified_order
from .errors import QualityGateError, UsageError
from .evaluation.card import ResultCard
from .evaluation.evaluate import Subject, evaluate
from .evaluation.intervals import paired_change
from .evaluation.state import Flags, read_state
from .exporters.parity import check_enough_images
from .introspect.fingerprint import images_hash, models_hash
from .job import Compressed, Compression
from .machine.device import choose_device
from .models import user_file
from .ratios import label, point
from .runs.run import Run, RunInputs
from .serialization import to_json

RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Ratios of the search, 0.05 to 0.95."""
CONFIDENCE, Z = 0.9, 1.645
"""Share of searches whose promise is kept on test images, and the quantile of each verdict (95 %, one-sided): a search
tries several ratios, and takes those as well that look good by luck."""
FEWEST_APART = 200
"""Held-out images on which no epoch was chosen; with fewer, all held-out images judge."""
STAGES = {"held-out": "Robustness of the dense model on held-out images"}


@dataclass(frozen=True)
class Goal:
    """What the pruned model must keep; one of the two.

    Attributes:
        min_robust: least robust accuracy, in (0, 1).
        max_drop: largest loss of robust accuracy against the dense model, in [0, 1).

    Raises:
        UsageError: both or neither are given, or one is out of range.
    """

    min_robust: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if (self.min_robust is None) == (self.max_drop is None):
            raise UsageError("a goal is a least robust accuracy or a largest drop of it. Give one of them.")
        if self.min_robust is not None and not 0 < self.min_robust < 1:
            raise UsageError(f"the least robust accuracy must be in (0, 100) %, got {100 * self.min_robust:g}.")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise UsageError(f"the largest drop must be in [0, 100) points, got {100 * self.max_drop:g}.")

    def __str__(self) -> str:
        if self.min_robust is not None:
            return f"robust accuracy of at least {100 * self.min_robust:g} %"
        assert self.max_drop is not None
        return f"robust accuracy at most {100 * self.max_drop:g} points below the dense model"

    def met(self, robust: float, dense: float) -> bool:
        """Return whether accuracies of the pruned and the dense model, in [0, 1], meet the goal."""
        return robust >= self.min_robust if self.min_robust is not None else dense - robust <= (self.max_drop or 0.0)


def goal_of(min_robust: float | None, max_drop: float | None) -> Goal:
    """Return the goal of a least robust accuracy in percent, or of a largest drop in points.

    Raises:
        UsageError: as `Goal`, or the accuracy looks like a share.
    """
    if min_robust is not None and 0 < min_robust < 1:
        raise UsageError(f"the least robust accuracy is in percent, got {min_robust:g}. Try {100 * min_robust:g}.")
    return Goal(*(None if value is None else value / 100 for value in (min_robust, max_drop)))


@dataclass(frozen=True)
class Tried:
    """Verdict on a ratio; accuracies in [0, 1] on held-out images.

    Attributes:
        ratio: the ratio.
        robust: robust accuracy.
        bound: the least accuracy, or for a drop the least difference to the dense model, to be expected on test images.
        meets: whether the bound meets the goal.
        failure: why there is no model, or nothing.
    """

    ratio: float
    robust: float = 0.0
    bound: float = 0.0
    meets: bool = False
    failure: str = ""

    def __str__(self) -> str:
        share = f"{100 * self.ratio:g} %"
        if self.failure:
            return f"{share}: {self.failure}"
        return (
            f"{share}: {100 * self.robust:.1f} % (bound {100 * self.bound:+.1f}, {'kept' if self.meets else 'missed'})"
        )


def verdict(goal: Goal, ratio: float, robust: Flags, dense: Flags, test_images: int) -> Tried:
    """Return whether a model can be expected to meet the goal on test images.

    The one-sided 95 % bound counts the noise of both sets of images. For a least accuracy it is that of Agresti and
    Coull (1998), for a drop that of Agresti and Min (2005) for differences of the same images: both add observations of
    each kind, so that a few images which all agree prove little.

    Args:
        goal: the goal.
        ratio: ratio of the model.
        robust, dense: whether each held-out image is classified correctly under attack by the pruned and the dense
            model, bool [N].
        test_images: number of test images that will judge the model.
    """
    noise = math.sqrt(1 / len(robust) + 1 / test_images)
    if goal.min_robust is not None:
        share = (float(robust.sum()) + Z**2 / 2) / (len(robust) + Z**2)
        bound, least = share - Z * math.sqrt(share * (1 - share)) * noise, goal.min_robust
    else:
        change, deviation = paired_change(robust, dense)
        bound = change - Z * deviation * noise
        least = -(goal.max_drop or 0.0)
    return Tried(ratio, float(robust.mean()), bound, bound >= least)


def largest(meets: Callable[[float], bool], ratios: Sequence[float] = RATIOS) -> float | None:
    """Return the largest of ascending ratios that meets the goal, by bisection, or None if none was found to.

    Robust accuracy is taken to fall with the ratio. About log2 of the number of ratios are tried.
    """
    low, high = -1, len(ratios)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(ratios[middle]) else (low, middle)
    return ratios[low] if low >= 0 else None


@working("Searching the smallest model")
def reach(job: Compression, goal: Goal) -> Compressed | None:
    """Compress by the largest ratio that keeps what the goal asks for.

    Each ratio that is tried is a run in a folder of its own, as in `frontier`, up to its fine-tuning. It is judged by
    the recipe's attack on held-out training images, which the models were not trained on. The model found is evaluated
    on test images once.

    Args:
        job: the compression; its own ratio is not used.
        goal: the goal.

    Raises:
        UsageError: there are no held-out images; or as `compress`.
        QualityGateError: no ratio meets the goal; or as `compress`.
        EnvironmentProblem: as `compress`.
    """
    check_section(job.recipe.bench)
    check_enough_images(job.data.train, job.data.name)
    choose_device(job.recipe.device)
    images = judges(job)
    judged = min(len(job.data.test), job.recipe.evaluation.images or len(job.data.test))
    if len(images) < FEWEST_APART:
        warn(f"{len(images)} held-out images judge, and tell little: see data.validation.")
    tried: list[Tried] = []
    with _open(job, goal) as run:
        dense = _robust(job, run, job.dense.module, images, "dense")
        if not goal.met(float(dense.mean()), float(dense.mean())):
            raise QualityGateError(
                f"the goal is {goal}, and the dense model has {100 * dense.mean():.1f} % on {len(dense):,} held-out "
                "images. Pruning creates no robustness: ask for less, or train the model further."
            )

        def meets(ratio: float) -> bool:
            part = point(job, run, ratio)
            console.print(f"{label(part)} (try {len(tried) + 1})", markup=False, style="bold")
            try:
                with open_run(part) as inner:
                    robust = _robust(part, inner, recover(part, inner).model, images, "pruned")
                tried.append(verdict(goal, ratio, robust, dense, judged))
            except QualityGateError as error:
                if distributed.count() > 1:
                    raise
                tried.append(Tried(ratio, failure=str(error).rstrip(".")))
            console.print(str(tried[-1]), markup=False)
            return tried[-1].meets

        best = largest(meets)
        note = (
            f"Goal: {goal}, kept on test images with {100 * CONFIDENCE:g} % confidence. Tried, on {len(images):,} "
            f"held-out images: {'; '.join(map(str, tried))}."
        )
        if best is None:
            raise QualityGateError(
                f"no ratio from {100 * RATIOS[0]:g} % meets the goal. {note} Fine-tune for longer, or hold out more "
                "images (data.validation), which makes verdicts less cautious."
            )
        done = compress(replace(point(job, run, best), notes=(note,)))
    if done is not None:
        _say(goal, done)
    return done


def judges(job: Compression) -> ImageSet:
    """Return the held-out images that judge: those by which no epoch is chosen, or all if these are few.

    Raises:
        UsageError: there are none.
    """
    held_out = job.data.validation
    if not len(held_out):
        raise UsageError("a goal is judged on held-out training images, and there are none. Set data.validation.")
    chosen = len(stratified(held_out, job.recipe.finetune.validation_images))
    rest = stratified_order(labels_of(held_out))[chosen:]
    return Subset(held_out, rest) if len(rest) >= FEWEST_APART else held_out


def _open(job: Compression, goal: Goal) -> Run:
    recipe = job.recipe.model_dump(mode="json")
    del recipe["pruning"]["ratio"]
    inputs = RunInputs.of(*job.identity, [recipe, to_json(goal)], job.code)
    folder = job.out or Path("runs") / f"{job.name}-goal-{inputs.key[:6]}"
    return Run.open(folder, inputs, job.recipe, job.command, STAGES, cache=job.cache)


def _robust(job: Compression, run: Run, model: nn.Module, images: ImageSet, name: str) -> Flags:
    """Run the stage that attacks held-out images; return which ones the model classifies correctly nevertheless."""
    recipe, state = job.recipe, run.folder / "held-out" / "state.npz"
    section = recipe.evaluation.model_copy(update={"images": None, "sweep": ()})

    def make() -> ResultCard:
        return evaluate(
            model.to(job.device), images, recipe.threat_model, section,
            subject=Subject(f"{name}, held-out images", job.data.name, "validation"), seed=recipe.seed,
            state_path=state, shared=True,
        )  # fmt: skip

    inputs = [
        models_hash(model), images_hash(images), job.data.name, to_json(recipe.threat_model),
        section.model_dump(mode="json"), user_file.versions(section.tier), recipe.seed, job.device,
    ]  # fmt: skip
    run.stage("held-out", ResultCard, inputs, make, files=[state], shared=True, reuse=inputs)
    return np.asarray(read_state(state)[1]["robust"], dtype=np.bool_)


def _say(goal: Goal, done: Compressed) -> None:
    cards = [model.card for model in done.report.models if model.card is not None]
    robust, dense = cards[1].robust.value, cards[0].robust.value
    kept = goal.met(robust, dense)
    text = f"{goal}: {'kept' if kept else 'missed'} on test images ({100 * robust:.1f} %, dense {100 * dense:.1f} %)."
    if kept:
        console.print(text, markup=False)
    else:
        warn(text)
