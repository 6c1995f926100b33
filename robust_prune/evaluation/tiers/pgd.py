"""Projected gradient descent from random starts on the cross-entropy: an upper bound."""

from __future__ import annotations

from ..stages import PGD, Stage


def stages(classes: int) -> tuple[Stage, ...]:
    """Return PGD alone."""
    return (PGD,)
