"""Results of a sensitivity measurement."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import RenderableType

from ..attacks.threat import ThreatModel
from ..shown import Shown


@dataclass(frozen=True)
class ModuleSensitivity:
    """Robustness sensitivity of one module.

    Attributes:
        name: qualified module name.
        kind: the module's class name, e.g. ``Conv2d``.
        mrs: Module Robustness Sensitivity at the profile's `rho`, in nats, >= 0.
        weight_norm: Frobenius norm of the weight.
        curve: MRS in nats at each of the profile's `radii`.
    """

    name: str
    kind: str
    mrs: float
    weight_norm: float
    curve: tuple[float, ...]


@dataclass(frozen=True)
class GroupSensitivity:
    """MRS of a coupled group, aggregated over its members by the profile's `aggregation`.

    Attributes:
        name: name of the group, which is that of its root module.
        mrs: aggregated MRS at `rho`, in nats.
        curve: aggregated MRS at each radius, in nats.
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
        aggregation: rule by which MRS is aggregated over a group: ``sum``, ``max``, ``mean`` or ``quadrature``.
        base_loss: robust loss R(theta) on the adversarial set in nats; exact to 0.001 where it was computed in bf16.
        images: number of images in the adversarial set.
        seed: random seed of the adversarial set.
        threat: norm and radius of the adversarial set.
        modules: sensitivity of each module, in the order of execution.
        groups: sensitivity of each group.
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
        """Return one sentence: number of modules and groups, estimator, radius, images and threat model."""
        return (
            f"MRS of {len(self.modules)} modules and {len(self.groups)} groups, {self.estimator}, relative radius "
            f"{self.rho:g}, {self.images:,} images under {self.threat}"
        )

    def table(self) -> RenderableType:
        """Return a table of MRS by module."""
        from .display import render_table

        return render_table(self)
