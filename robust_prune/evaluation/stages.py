"""Stages of evaluation tiers: the attacks of which robust accuracy is the worst case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

from ..catalogue import TIERS
from ..errors import UsageError
from ..models import user_file

Kind = Literal["pgd", "apgd-ce", "apgd-t", "ensemble"]
APGD_STEPS = 100
STANDARD_TARGETS = 9
"""Number of target classes of AutoAttack's targeted APGD."""


@dataclass(frozen=True)
class Stage:
    """One attack of a tier; it attacks the images that survived the previous stages.

    Attributes:
        name: name in the breakdown.
        kind: our PGD, our APGD on cross-entropy, our targeted APGD, or an attack of the AutoAttack ensemble.
        rank: for ``apgd-t``, the rank of the target class by its logit on the clean image: 1 is the highest logit after
            the label.
    """

    name: str
    kind: Kind
    rank: int = 0


PGD = Stage("pgd", "pgd")


def apgd_stages(classes: int, targets: int) -> tuple[Stage, ...]:
    """Return PGD, APGD-CE and targeted APGD, in the order of their cost.

    Args:
        classes: number of classes of the model, K.
        targets: number of target classes, at most K - 1.
    """
    ranks = range(1, min(targets, classes - 1) + 1)
    return (PGD, Stage("apgd-ce", "apgd-ce"), *(Stage("apgd-t", "apgd-t", rank) for rank in ranks))


def stages_of(tier: str, classes: int) -> tuple[Stage, ...]:
    """Return the attacks of a tier for a model with `classes` classes, in order.

    Raises:
        UsageError: the tier is unknown, needs more classes, or does not return a tuple of stages of known kinds.
    """
    function = TIERS.load(tier)
    with user_file.reported(tier):
        found = function(classes)
    if not isinstance(found, tuple) or not found or not all(isinstance(stage, Stage) for stage in found):
        raise UsageError(f"tier {tier!r} must return a tuple of stages, got {found!r}")
    for stage in found:
        if stage.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise UsageError(f"tier {tier!r} has a stage of the unknown kind {stage.kind!r}. Known kinds: {known}.")
    return found


def attack_line(stages: Sequence[Stage], steps: int, restarts: int, classes: int, precision: str = "fp32") -> str:
    """Return one line with the attacks and their settings, and whether the accuracy under them is an upper bound.

    Args:
        stages: the attacks.
        steps, restarts: those of PGD.
        classes: number of classes of the model, K. Attacks weaker than targeted APGD towards all other classes, nine at
            most, leave an upper bound of what AutoAttack leaves.
        precision: precision of the gradients, named unless it is fp32.
    """
    if stages[0].kind == "ensemble":
        return "AutoAttack, standard version (pyautoattack), fp32 verdict"
    parts, targets = [], 0
    for (name, kind), group in groupby(stages, lambda stage: (stage.name, stage.kind)):
        count = len(list(group))
        if kind == "pgd":
            losses = "margin" if restarts == 1 else "margin and cross-entropy"
            parts.append(f"PGD-{steps}, {restarts} random restart{'s' if restarts != 1 else ''}, {losses}")
        else:
            aimed = f", {count} target{'s' if count != 1 else ''}" if kind == "apgd-t" else ""
            parts.append(f"{name.upper()}-{APGD_STEPS}{aimed}")
            targets += count if kind == "apgd-t" else 0
    bound = ", an upper bound" if targets < min(STANDARD_TARGETS, classes - 1) else ""
    gradients = f", {precision} gradients" if precision != "fp32" else ""
    return "; ".join(parts) + ", fp32 verdict" + gradients + bound
