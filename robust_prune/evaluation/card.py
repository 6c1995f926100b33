"""Result cards: clean and robust accuracy with confidence intervals, and the conditions of the measurement."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import computed_field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ..attacks.threat import ThreatModel
from ..shown import Shown
from .intervals import paired_interval, wilson_interval

BYTE = 8


Verdicts = NDArray[np.bool_]
"""Whether each image of a set, in its order, is classified correctly: bool [N]."""


@pydantic_dataclass(frozen=True)
class Accuracy:
    """Number of correct predictions out of `total` images; its JSON also has the rate and its interval.

    Attributes:
        correct, total: number of correct predictions and of images.
        right: which images are classified correctly, one bit each in their order, in base 64; empty if not kept.
    """

    correct: int
    total: int
    right: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, verdicts: Verdicts) -> Accuracy:
        """Return the accuracy of verdicts on images, bool [N], which are kept."""
        packed = base64.b64encode(np.packbits(verdicts).tobytes()).decode()
        return cls(int(verdicts.sum()), len(verdicts), packed)

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total:
            raise ValueError(f"{self.correct} correct predictions of {self.total} images")
        if self.right and int(self.verdicts.sum()) != self.correct:
            raise ValueError(f"its single verdicts are not {self.correct} of {self.total}")

    @property
    def verdicts(self) -> Verdicts:
        """Whether each image is classified correctly, bool [N]; N is 0 if only the number was kept."""
        octets = -(-self.total // BYTE)
        if self.right and len(self.right) != 4 * -(-octets // 3):
            raise ValueError(f"its single verdicts are not those of {self.total} images")
        bits = np.unpackbits(np.frombuffer(base64.b64decode(self.right, validate=True), np.uint8))
        if self.right and len(bits) != BYTE * octets:
            raise ValueError(f"its single verdicts are not those of {self.total} images")
        return bits[: self.total].astype(np.bool_)

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

    def change_from(self, before: Accuracy) -> tuple[float, float] | None:
        """Return the 95 % interval of the change from `before` on the same images, in [-1, 1].

        None if either has not kept its verdicts, or the numbers of images differ.
        """
        if not (self.right and before.right) or self.total != before.total:
            return None
        return paired_interval(self.verdicts, before.verdicts)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.2f} % [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class ClassAccuracy:
    """Correct predictions on the images of one class.

    Attributes:
        label: the class.
        total: number of its images.
        clean, robust: number of them that are classified correctly without an attack and under all attacks.
    """

    label: int
    total: int
    clean: int
    robust: int


@dataclass(frozen=True)
class ExportedAccuracy:
    """Accuracy of an exported form of the model.

    Attributes:
        clean: accuracy without an attack.
        robust: share of images that the torch model classifies correctly without an attack, and the exported model
            without an attack, at the worst points found on the torch model and under the black-box check on itself.
    """

    clean: Accuracy
    robust: Accuracy


@dataclass(frozen=True, repr=False)
class ResultCard(Shown):
    """Clean and robust accuracy of one model on one split.

    Attributes:
        model: name of the model in reports.
        data: name of the data set.
        split: split of the images.
        tier: evaluation tier, e.g. ``pgd`` (PGD-20).
        attack: one line with the attacks, their steps, restarts and losses.
        threat: norm and radius.
        clean: accuracy without an attack.
        robust: accuracy in the point-wise worst case over all attacks.
        flags: warnings, one sentence each, about results that may not be trusted; empty if there are none.
        forwards: forward passes of single images during the attacks.
        backwards: backward passes of single images during the attacks.
        seconds: wall time of the evaluation.
        seed: random seed of the attacks.
        breakdown: number of images classified correctly after each attack, in the order of the attacks.
        per_class: accuracy of each class.
        sweep: pairs of a radius, in units of the [0, 1] pixel range, and the accuracy there under PGD on the first
            images.
        model_hash: SHA-256 of the model.
        images_hash: SHA-256 of a sample of the images.
        macs: multiply-accumulates of one image; None if they were not counted.
        params: number of parameters; None if they were not counted.
        exported: accuracy of exported forms of the model, by name.
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
        """Return one sentence: clean and robust accuracy with 95 % intervals, and the number of alarms."""
        alarms = f"; {len(self.flags)} alarm{'s' if len(self.flags) > 1 else ''}" if self.flags else ""
        return (
            f"{self.model} on {self.robust.total:,} {self.split} images of {self.data}: clean {self.clean}, robust "
            f"{self.robust} under {self.threat}, tier {self.tier}{alarms}"
        )
