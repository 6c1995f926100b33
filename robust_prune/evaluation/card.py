"""The result card: what was measured, on what, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pydantic import computed_field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ..attacks.threat import ThreatModel
from ..shown import Shown


def wilson_interval(successes: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927), 95 % by default.

    Returns:
        Lower and upper bound in [0, 1]; (0, 1) for an empty sample.
    """
    if total == 0:
        return 0.0, 1.0
    p = successes / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@pydantic_dataclass(frozen=True)
class Accuracy:
    """Correct predictions out of a number of images. As JSON it holds the rate and its interval too."""

    correct: int
    total: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def value(self) -> float:
        """Share of correct predictions in [0, 1]."""
        return self.correct / self.total if self.total else float("nan")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval in [0, 1]."""
        return wilson_interval(self.correct, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.2f} % [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class ClassAccuracy:
    """Correct predictions on the images of one class."""

    label: int
    total: int
    clean: int
    robust: int


@dataclass(frozen=True)
class ExportedAccuracy:
    """What an exported form of the model gets right.

    Attributes:
        clean: images without an attack.
        robust: images that the torch model gets right as they are, and the exported one as they are, at the worst
            points found on the torch model, and after the black-box check on the exported one itself.
    """

    clean: Accuracy
    robust: Accuracy


@dataclass(frozen=True, repr=False)
class ResultCard(Shown):
    """Clean and robust accuracy of one model on one split.

    Attributes:
        model: how the report names it.
        data: which images.
        split: which part of them.
        tier: strength of the attack, e.g. ``pgd`` (PGD-20).
        attack: one line naming steps, restarts and loss.
        threat: norm and radius.
        clean: images that are right without an attack.
        robust: images that are right at every point tried: the point-wise worst case over all attacks.
        flags: sentences that warn that a figure may not be trusted; empty is good.
        forwards: forward passes of single images that the attack spent.
        backwards: backward passes of single images that it spent.
        seconds: wall time of the evaluation.
        seed: seed of the random starts.
        breakdown: images still right after each attack, in the order in which they ran.
        per_class: the counts by class.
        sweep: accuracy at other radii, by PGD on the first images, the radius in [0, 1] pixel units first.
        model_hash: SHA-256 of the model.
        images_hash: SHA-256 of (a sample of) the images.
        macs: multiply-accumulates of the model for one image; None where nobody counted them.
        params: parameters of the model; None where nobody counted them.
        exported: what exported forms of the model get right, by name.
    """

    model: str
    data: str
    split: str
    tier: str
    attack: str
    threat: ThreatModel
    clean: Accuracy
    robust: Accuracy
    flags: tuple[str, ...]
    forwards: int
    backwards: int
    seconds: float
    seed: int
    breakdown: dict[str, int] = field(default_factory=dict)
    per_class: tuple[ClassAccuracy, ...] = ()
    sweep: tuple[tuple[float, Accuracy], ...] = ()
    model_hash: str = ""
    images_hash: str = ""
    macs: int | None = None
    params: int | None = None
    exported: dict[str, ExportedAccuracy] = field(default_factory=dict)

    def short(self) -> str:
        """Clean and robust accuracy with their intervals, and alarms."""
        alarms = f"; {len(self.flags)} alarm{'s' if len(self.flags) > 1 else ''}" if self.flags else ""
        return (
            f"{self.model} on {self.robust.total:,} {self.split} images of {self.data}: clean {self.clean}, robust "
            f"{self.robust} under {self.threat}, tier {self.tier}{alarms}"
        )
