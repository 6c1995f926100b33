"""Evaluation tiers: how strong an attack a robust figure has survived."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Tier:
    """One strength of attack.

    Attributes:
        name: as users write it and as every printed figure carries it.
        summary: what it runs, in one line.
    """

    name: str
    summary: str

    def attack_line(self, steps: int, restarts: int) -> str:
        """The attack in one line, with its settings."""
        return f"PGD-{steps}, {restarts} random restart{'s' if restarts != 1 else ''}, cross-entropy, fp32 verdict"


TIERS: dict[str, Tier] = {
    "pgd": Tier("pgd", "projected gradient descent from random starts on the cross-entropy"),
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
