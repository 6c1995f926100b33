"""Evaluation tiers: how strong an attack a robust figure has survived."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ..errors import UsageError
from ..evaluation import standard

Kind = Literal["pgd", "apgd-ce", "apgd-t", "ensemble"]
APGD_STEPS = 100
FEW_TARGETS, ALL_TARGETS = 3, 9


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


@dataclass(frozen=True)
class Tier:
    """One strength of attack.

    Attributes:
        name: as users write it and as every printed figure carries it.
        summary: what it runs, in one line.
        targets: how many classes APGD is aimed at, where the tier runs it.
    """

    name: str
    summary: str
    targets: int = 0

    @property
    def black_box(self) -> bool:
        """Whether a few survivors are tried without gradients as well."""
        return self.name != "pgd"

    def stages(self, classes: int) -> tuple[Stage, ...]:
        """The attacks in order, cheap ones first.

        Args:
            classes: of the model; there are no more targets than other classes.
        """
        if self.name == "pgd":
            return (Stage("pgd", "pgd"),)
        if self.name == "standard":
            return tuple(Stage(name, "ensemble") for name in standard.ATTACKS)
        ranks = range(1, min(self.targets, classes - 1) + 1)
        return (Stage("pgd", "pgd"), Stage("apgd-ce", "apgd-ce"), *(Stage("apgd-t", "apgd-t", rank) for rank in ranks))

    def attack_line(self, classes: int, steps: int, restarts: int) -> str:
        """The attacks in one line, with their settings."""
        if self.name == "standard":
            return "AutoAttack, standard version (pyautoattack), fp32 verdict"
        parts = [f"PGD-{steps}, {restarts} random restart{'s' if restarts != 1 else ''}, cross-entropy"]
        for name, group in groupby(self.stages(classes)[1:], lambda stage: stage.name):
            count = len(list(group))
            aimed = f", {count} target{'s' if count != 1 else ''}" if name == "apgd-t" else ""
            parts.append(f"{name.upper()}-{APGD_STEPS}{aimed}")
        return "; ".join(parts) + ", fp32 verdict"


TIERS: dict[str, Tier] = {
    tier.name: tier
    for tier in (
        Tier("pgd", "projected gradient descent from random starts on the cross-entropy"),
        Tier("apgd", f"PGD, then APGD on the cross-entropy and towards {FEW_TARGETS} classes", FEW_TARGETS),
        Tier("aa-fast", f"the same towards {ALL_TARGETS} classes: the standard's number in less time", ALL_TARGETS),
        Tier("standard", "AutoAttack's four attacks, by pyautoattack"),
    )
}


def find_tier(name: str) -> Tier:
    """The tier called `name`.

    Raises:
        UsageError: no such tier; the message lists those that exist.
    """
    if name not in TIERS:
        known = ", ".join(f"{tier.name} ({tier.summary})" for tier in TIERS.values())
        raise UsageError(f"unknown evaluation tier {name!r}. Tiers that exist: {known}.")
    return TIERS[name]
