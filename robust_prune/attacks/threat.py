"""Threat models: the perturbations that an attacker may add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from ..errors import UsageError

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class ThreatModel:
    """Set of perturbations of norm at most ``epsilon`` that keep the image in [0, 1].

    Attributes:
        norm: ``"linf"`` or ``"l2"``.
        epsilon: radius in units of the [0, 1] pixel range, at least 0; 8/255 is the usual ``linf`` radius on CIFAR-10.

    Raises:
        UsageError: the norm is unknown, or the radius is negative or not finite.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    norm: Norm = "linf"
    epsilon: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise UsageError(f"threat norm must be 'linf' or 'l2', got {self.norm!r}")
        if not 0 <= self.epsilon < float("inf"):
            raise UsageError(f"epsilon must be a finite number >= 0, got {self.epsilon}. Try 8/255.")

    def __str__(self) -> str:
        if self.norm == "linf":
            return f"Linf {self.epsilon * 255:.3g}/255"
        return f"L2 {self.epsilon:.3g}"
