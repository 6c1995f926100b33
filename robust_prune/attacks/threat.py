"""Threat models: the perturbations that an attacker may add."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, cast

from pydantic import ConfigDict

from .. import radius
from ..errors import UsageError

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class ThreatModel:
    """Set of perturbations of norm at most ``epsilon`` that keep the image in [0, 1].

    Attributes:
        norm: ``"linf"`` or ``"l2"``.
        epsilon: radius in units of the [0, 1] pixel range, at least 0, and at most 1 for ``linf``; by default 8/255,
            the usual ``linf`` radius on CIFAR-10. ``l2`` has no default (0.5 is usual).

    Raises:
        UsageError: the norm is unknown, or the radius is missing, negative, not finite or above 1 for ``linf``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    norm: Norm = "linf"
    epsilon: float = cast(float, None)  # `__post_init__` fills it in, since it depends on the norm

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise UsageError(f"threat norm must be 'linf' or 'l2', got {self.norm!r}")
        epsilon = 8 / 255 if self.epsilon is None and self.norm == "linf" else self.epsilon
        if epsilon is None:
            raise UsageError("norm l2 needs a radius of its own, got none. Give one: ThreatModel('l2', 0.5) is usual.")
        if not isinstance(epsilon, Real) or isinstance(epsilon, bool):
            raise UsageError(f"epsilon must be a number such as 8 / 255, got {epsilon!r}")
        if problem := radius.refusal(self.norm, float(epsilon)):
            raise UsageError(f"epsilon {problem}")
        object.__setattr__(self, "epsilon", float(epsilon))

    def __str__(self) -> str:
        if self.norm == "linf":
            return f"Linf {self.epsilon * 255:.3g}/255"
        return f"L2 {self.epsilon:.3g}"
