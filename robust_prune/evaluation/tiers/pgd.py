"""PGD from random starts on the margin and on the cross-entropy in turn: an upper bound."""

from __future__ import annotations

from ..stages import PGD, Stage


def stages(classes: int) -> tuple[Stage, ...]:
    """Return PGD alone."""
    return (PGD,)
