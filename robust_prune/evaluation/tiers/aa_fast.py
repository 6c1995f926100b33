"""PGD, then APGD on the cross-entropy and towards nine classes: the result of the standard in less time."""

from __future__ import annotations

from ..stages import STANDARD_TARGETS, Stage, apgd_stages


def stages(classes: int) -> tuple[Stage, ...]:
    """Return PGD, APGD-CE and the nine targets of AutoAttack's targeted APGD, without FAB and Square."""
    return apgd_stages(classes, targets=STANDARD_TARGETS)
