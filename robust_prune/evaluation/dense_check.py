"""A quick attack on the dense model before it is compressed: pruning keeps robustness, it does not create it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import ThreatModel, frozen_eval
from ..attacks.objectives import classify, cross_entropy
from ..attacks.pgd import default_step_size, input_gradient
from ..attacks.projections import ascent_step, project, random_start
from ..console import track
from ..data.base import ImageSet, as_floats, images_at_once, labels_of, stratified_order
from ..errors import RobustPruneError, UsageError
from .card import Accuracy
from .passes import check_labels

STEPS, IMAGES = 10, 200
SECONDS, FEWEST_CLEAN, FEWEST_ATTACKED, ENOUGH_SURVIVORS = 5.0, 48, 32, 4
"""Seconds after which each of the two passes ends, given at least so many images; a model of which so many images
survive has some robustness, and is not attacked further."""
LOST_SHARE = 0.1
"""Adversarially trained models keep 40 to 70 % of their clean accuracy under their own threat model, others less than
2 %; a tenth lies between them with a factor of four to either side."""
CHANCE_Z = 1.645  # one-sided 95 %


@dataclass(frozen=True)
class DenseCheck:
    """Accuracy of the dense model on a few images that are no test images.

    Attributes:
        split: where the images are from, ``held-out`` or ``training``.
        clean, robust: accuracy without an attack and under it; the latter on the first of the same images.
        chance: accuracy in [0, 1] of always naming the most frequent class.
        classes: number of classes.
        threat: norm and radius.
    """

    split: str
    clean: Accuracy
    robust: Accuracy
    chance: float
    classes: int
    threat: ThreatModel

    def line(self) -> str:
        """Return one line with the figures and their conditions."""
        fewer = f" of {self.robust.total} of them" if self.robust.total < self.clean.total else ""
        return (
            f"Dense model on {self.clean.total} {self.split} images: clean {100 * self.clean.value:.1f} %, "
            f"robust{fewer} {100 * self.robust.value:.1f} % (PGD-{STEPS}, {self.threat})"
        )

    def note(self) -> str:
        """Return a warning if there is nothing to keep, else an empty string.

        Clean accuracy is compared with the one-sided 95 % bound of naming the most frequent class. Robust accuracy is
        hardly any if it is at most that of naming the most frequent class, or a tenth of clean accuracy.
        """
        clean, robust, chance = self.clean.value, self.robust.value, self.chance
        if clean <= chance + CHANCE_Z * math.sqrt(chance * (1 - chance) / self.clean.total):
            return (
                f"clean accuracy of the dense model, {100 * clean:.1f} %, is chance for {self.classes} classes: are "
                "weights, normalization and class order right?"
            )
        if self.threat.epsilon == 0 or robust > max(LOST_SHARE * clean, chance):
            return ""
        much = "no" if self.robust.correct == 0 else "hardly any"
        return (
            f"robust accuracy of the dense model is {100 * robust:.1f} % under {self.threat}: there is {much} "
            "robustness to keep, and pruning creates none. Train it first (robust-prune train)."
        )


def check_dense(
    model: nn.Module, held_out: ImageSet, train: ImageSet, classes: int, threat: ThreatModel, seed: int, device: str
) -> DenseCheck:
    """Measure clean accuracy and accuracy under PGD of a few images within seconds.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; it is moved to `device`, modes are restored.
        held_out: held-out training images, of which up to 200 of all classes are used.
        train: training images, which are used where none are held out.
        classes: number of classes, K.
        threat: norm and radius.
        seed: random seed of the attack.
        device: ``cpu`` or ``cuda``.

    Raises:
        UsageError: a label exceeds the number of classes, or the model cannot be run and attacked on the images.
    """
    try:
        return _check(model, held_out, train, classes, threat, seed, device)
    except RobustPruneError:
        raise
    except Exception as error:  # a user's model may raise anything
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(f"the dense model cannot be run and attacked on images of the data: {what}") from error


def _check(
    model: nn.Module, held_out: ImageSet, train: ImageSet, classes: int, threat: ThreatModel, seed: int, device: str
) -> DenseCheck:
    split, images = ("held-out", held_out) if len(held_out) else ("training", train)
    # Where time ends the check, the images seen so far are of all classes.
    order = stratified_order(labels_of(images))[:IMAGES]
    parts = order.split(images_at_once(images, 50))
    right: list[Tensor] = []
    labels: list[Tensor] = []
    survived = attacked = 0
    generator = torch.Generator().manual_seed(seed)
    with frozen_eval(model.to(device)), track("Quick attack", len(order)) as advance:
        begin = time.monotonic()
        for part in parts:
            x, y = _batch(images, part, classes, device)
            with torch.no_grad():
                right.append(classify(model(x)) == y)
            labels.append(y.cpu())
            if time.monotonic() - begin > SECONDS and sum(map(len, right)) >= FEWEST_CLEAN:
                break
        begin = time.monotonic()
        for part, keep in zip(parts, right, strict=False):
            x, y = _batch(images, part, classes, device)
            survived += _survivors(model, x[keep], y[keep], threat, generator)
            attacked += len(part)
            advance(len(part))
            enough = attacked >= FEWEST_ATTACKED or survived >= ENOUGH_SURVIVORS
            if time.monotonic() - begin > SECONDS and enough:
                break
    seen = torch.cat(labels)
    # Among few images of many classes some class is frequent by accident.
    frequent = seen.bincount().max().item() / len(seen) if len(seen) >= 5 * classes else 0.0
    clean = Accuracy(int(torch.cat(right).sum()), len(seen))
    return DenseCheck(split, clean, Accuracy(survived, attacked), max(frequent, 1 / classes), classes, threat)


def _batch(images: ImageSet, part: Tensor, classes: int, device: str) -> tuple[Tensor, Tensor]:
    x, y = images.get(part)
    check_labels(y, classes)
    return as_floats(x, device), y.to(device)


def _survivors(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> int:
    """Return the number of images that no iterate of PGD fools; those that are fooled are not attacked further."""
    step = default_step_size(threat, STEPS)
    points = project(random_start(x, threat, generator), x, threat)
    for _ in range(STEPS if threat.epsilon else 0):
        if len(y) == 0:
            return 0
        watched = _Watched(y)
        gradient, _ = input_gradient(model, points, watched)
        keep = watched.right
        points, x, y = points[keep].detach(), x[keep], y[keep]
        points = project(ascent_step(points, gradient[keep], step, threat), x, threat)
    with torch.no_grad():
        return int((classify(model(points)) == y).sum()) if len(y) else 0


class _Watched:
    """The cross-entropy to `y` [N] as an objective, which notes the images that are classified correctly."""

    def __init__(self, y: Tensor) -> None:
        self.y = y
        self.right = torch.ones_like(y, dtype=torch.bool)

    def __call__(self, logits: Tensor) -> Tensor:
        self.right = classify(logits.detach()) == self.y
        return cross_entropy(logits, self.y)
