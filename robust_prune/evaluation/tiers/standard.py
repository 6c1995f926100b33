"""AutoAttack: its four attacks, by the package pyautoattack."""

from __future__ import annotations

from ..autoattack import ATTACKS, check_classes
from ..stages import Stage


def stages(classes: int) -> tuple[Stage, ...]:
    """Return the four attacks of AutoAttack (Croce & Hein, 2020, arXiv 2003.01690).

    Raises:
        UsageError: there are fewer than four classes, for which its targeted attacks are not defined.
    """
    check_classes(classes)
    return tuple(Stage(name, "ensemble") for name in ATTACKS)
