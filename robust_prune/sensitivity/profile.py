"""The outcome of a sensitivity measurement."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from ..attacks.threat import ThreatModel
from ..shown import Shown


@dataclass(frozen=True)
class ModuleSensitivity:
    """Robustness sensitivity of one module.

    Attributes:
        name: qualified module name.
        kind: the module's class name, e.g. ``Conv2d``.
        mrs: Module Robustness Sensitivity at the profile's `rho`: cross-entropy in nats, >= 0.
        weight_norm: Frobenius norm of the weight.
        curve: MRS at each of the profile's `radii` (same order).
    """

    name: str
    kind: str
    mrs: float
    weight_norm: float
    curve: tuple[float, ...]


@dataclass(frozen=True)
class GroupSensitivity:
    """MRS of a coupled group: its members' curves under the profile's `aggregation`.

    Attributes:
        name: the group's name (its root module).
        mrs: aggregated MRS at `rho`.
        curve: aggregated MRS at each radius.
    """

    name: str
    mrs: float
    curve: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class SensitivityProfile(Shown):
    """MRS of every prunable module and of every group.

    Attributes:
        estimator: ``gradient``, ``boundary`` or ``ascent``.
        rho: relative radius at which `mrs` is reported.
        radii: relative radii of the curves, ascending; contains `rho`.
        aggregation: how members make a group's value.
        base_loss: robust loss R(theta) in nats on the adversarial set; within 0.001 where it was computed in bf16.
        images: size of the adversarial set.
        seed: seed of the adversarial set.
        threat: norm and radius that the set was made for.
    """

    estimator: str
    rho: float
    radii: tuple[float, ...]
    aggregation: str
    base_loss: float
    images: int
    seed: int
    threat: ThreatModel
    modules: tuple[ModuleSensitivity, ...]
    groups: tuple[GroupSensitivity, ...] = ()

    def short(self) -> str:
        """How it was measured, on what."""
        return (
            f"MRS of {len(self.modules)} modules and {len(self.groups)} groups, {self.estimator}, relative radius "
            f"{self.rho:g}, {self.images:,} images under {self.threat}"
        )

    def table(self) -> Table:
        """MRS by layer and group."""
        from .display import render_table

        return render_table(self)
