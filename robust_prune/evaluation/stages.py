"""Evaluation tiers: how strong an attack a robust figure has survived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ..catalogue import TIERS
from ..errors import UsageError

Kind = Literal["pgd", "apgd-ce", "apgd-t", "ensemble"]
APGD_STEPS = 100


@dataclass(frozen=True)
class Stage:
    """One attack of a tier; it works on the images that survived the stages before.

    Attributes:
        name: as the breakdown calls it.
        kind: how it runs: our PGD, our APGD without or with a target, or an attack of the standard's ensemble.
        rank: for ``apgd-t``, the target: 1 is the class of the highest logit on the clean image after the label's.
    """

    name: str
    kind: Kind
    rank: int = 0


PGD = Stage("pgd", "pgd")


def apgd_stages(classes: int, targets: int) -> tuple[Stage, ...]:
    """PGD, then APGD without and with targets, cheap ones first.

    Args:
        classes: of the model; there are no more targets than other classes.
        targets: how many classes APGD is aimed at.
    """
    ranks = range(1, min(targets, classes - 1) + 1)
    return (PGD, Stage("apgd-ce", "apgd-ce"), *(Stage("apgd-t", "apgd-t", rank) for rank in ranks))


def stages_of(tier: str, classes: int) -> tuple[Stage, ...]:
    """The attacks of a tier, in order.

    Raises:
        UsageError: no such tier, one that so few classes do not allow, or one that answers in another form.
    """
    found = TIERS.load(tier)(classes)
    if not isinstance(found, tuple) or not found or not all(isinstance(stage, Stage) for stage in found):
        raise UsageError(f"tier {tier!r} must return a tuple of stages, got {found!r}")
    return found


def attack_line(stages: Sequence[Stage], steps: int, restarts: int) -> str:
    """The attacks in one line, with their settings."""
    if stages[0].kind == "ensemble":
        return "AutoAttack, standard version (pyautoattack), fp32 verdict"
    parts = []
    for (name, kind), group in groupby(stages, lambda stage: (stage.name, stage.kind)):
        count = len(list(group))
        if kind == "pgd":
            parts.append(f"PGD-{steps}, {restarts} random restart{'s' if restarts != 1 else ''}, cross-entropy")
        else:
            aimed = f", {count} target{'s' if count != 1 else ''}" if kind == "apgd-t" else ""
            parts.append(f"{name.upper()}-{APGD_STEPS}{aimed}")
    return "; ".join(parts) + ", fp32 verdict"
