"""The outcome of a sensitivity measurement."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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


@dataclass(frozen=True)
class SensitivityProfile:
    """MRS of every prunable module and of every group.

    Attributes:
        estimator: ``gradient``, ``boundary`` or ``ascent``.
        rho: relative radius at which `mrs` is reported.
        radii: relative radii of the curves, ascending; contains `rho`.
        aggregation: how members make a group's value.
        base_loss: robust loss R(theta) in nats on the adversarial set; within 0.001 where it was computed in bf16.
        images: size of the adversarial set.
        seed: seed of the adversarial set.
        threat: the threat model as JSON.
    """

    estimator: str
    rho: float
    radii: tuple[float, ...]
    aggregation: str
    base_loss: float
    images: int
    seed: int
    threat: dict[str, Any]
    modules: tuple[ModuleSensitivity, ...]
    groups: tuple[GroupSensitivity, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The profile as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SensitivityProfile:
        """The profile that `to_json` wrote."""
        data = dict(value)
        data["radii"] = tuple(data["radii"])
        data["modules"] = tuple(ModuleSensitivity(**{**m, "curve": tuple(m["curve"])}) for m in data["modules"])
        data["groups"] = tuple(GroupSensitivity(**{**g, "curve": tuple(g["curve"])}) for g in data["groups"])
        return cls(**data)
