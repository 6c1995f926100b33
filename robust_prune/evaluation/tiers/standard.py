"""AutoAttack: its four attacks, by the package pyautoattack."""

from __future__ import annotations

from ..stages import Stage
from ..standard import ATTACKS, check_classes


def stages(classes: int) -> tuple[Stage, ...]:
    """The ensemble of Croce & Hein (2020, arXiv 2003.01690).

    Raises:
        UsageError: fewer classes than its targeted attacks are defined for.
    """
    check_classes(classes)
    return tuple(Stage(name, "ensemble") for name in ATTACKS)
