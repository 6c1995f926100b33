"""PGD, then APGD on the cross-entropy and towards three classes."""

from __future__ import annotations

from ..stages import Stage, apgd_stages


def stages(classes: int) -> tuple[Stage, ...]:
    """The three classes are those of the highest logits after the label's."""
    return apgd_stages(classes, targets=3)
