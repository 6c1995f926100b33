"""PGD, then APGD on the cross-entropy and towards three classes: an upper bound."""

from __future__ import annotations

from ..stages import Stage, apgd_stages


def stages(classes: int) -> tuple[Stage, ...]:
    """Return PGD, APGD-CE and targeted APGD towards the three classes with the highest logits after the label."""
    return apgd_stages(classes, targets=3)
