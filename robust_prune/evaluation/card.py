"""The result card: what was measured, on what, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any


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


@dataclass(frozen=True)
class Accuracy:
    """Correct predictions out of a number of images."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """Share of correct predictions in [0, 1]."""
        return self.correct / self.total if self.total else float("nan")

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
class ResultCard:
    """Clean and robust accuracy of one model on one split.

    Attributes:
        model: how the report names it.
        data, split: which images.
        tier: strength of the attack, e.g. ``pgd`` (PGD-20).
        attack: one line naming steps, restarts and loss.
        threat: the threat model as JSON.
        clean, robust: counts; robust is the point-wise worst case over all attacks.
        flags: sentences that warn that a figure may not be trusted; empty is good.
        forwards, backwards: image passes that the attack spent.
        seconds: wall time of the evaluation.
        seed: seed of the random starts.
        breakdown: images still right after each attack, in the order in which they ran.
        per_class: the counts by class.
        sweep: accuracy at other radii, by PGD on the first images, the radius in [0, 1] pixel units first.
        model_hash, images_hash: SHA-256 of the model and of (a sample of) the images.
        macs, params: of the model; None where nobody counted them.
    """

    model: str
    data: str
    split: str
    tier: str
    attack: str
    threat: dict[str, Any]
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

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values, rates and intervals included."""
        value = asdict(self)
        for key, accuracy in (("clean", self.clean), ("robust", self.robust)):
            value[key] |= {"value": accuracy.value, "interval": list(accuracy.interval)}
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ResultCard:
        """The card that `to_json` wrote."""
        data = dict(value)
        for key in ("clean", "robust"):
            data[key] = Accuracy(data[key]["correct"], data[key]["total"])
        data["flags"] = tuple(data["flags"])
        data["per_class"] = tuple(ClassAccuracy(**counts) for counts in data.get("per_class", ()))
        data["sweep"] = tuple((radius, Accuracy(**counts)) for radius, counts in data.get("sweep", ()))
        known = {f.name for f in fields(cls)}
        return cls(**{key: part for key, part in data.items() if key in known})
