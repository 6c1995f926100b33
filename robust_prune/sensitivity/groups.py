"""From the sensitivity of modules to that of coupled groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import UsageError
from ..structure.types import ChannelGroup
from .profile import GroupSensitivity, ModuleSensitivity, SensitivityProfile
from .targets import ATTENTION_WEIGHTS

_RULES: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum,
    "max": max,
    "mean": lambda values: math.fsum(values) / len(values),
    "quadrature": lambda values: math.hypot(*values),
}
AGGREGATIONS = tuple(_RULES)


def check_aggregation(aggregation: str) -> None:
    """Raises UsageError unless `aggregation` is one of `AGGREGATIONS`."""
    if aggregation not in _RULES:
        raise UsageError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")


def aggregate_groups(
    profile: SensitivityProfile, groups: Sequence[ChannelGroup], aggregation: str = "sum"
) -> SensitivityProfile:
    """The profile with one MRS and curve for each of `groups`, replacing those it had.

    A group's members are its producers: the layers whose output channels it cuts.

    - ``sum`` (default): cutting the group perturbs all producers at once. If each stays within its own ball of
      relative radius ρ, the worst joint rise of the loss is to first order exactly the sum of the members' MRS.
    - ``quadrature``: root of the sum of squares; what uncorrelated members add up to on average, below the worst case.
    - ``max``: the most sensitive member alone; a lower bound of the joint worst case.
    - ``mean``: for comparison; it rates a residual stream with many producers no higher than a single layer.

    Args:
        profile: with the producers' sensitivities.
        groups: from the same model.
        aggregation: one of `AGGREGATIONS`.

    Raises:
        UsageError: an unknown aggregation, or a group none of whose producers was measured.
    """
    check_aggregation(aggregation)
    modules = {module.name: module for module in profile.modules}
    found = tuple(_aggregate(group, modules, aggregation) for group in groups)
    return replace(profile, aggregation=aggregation, groups=found)


def tempered(profile: SensitivityProfile, groups: Sequence[ChannelGroup], exponent: float) -> SensitivityProfile:
    """The profile for spending a budget by: each module's losses raised to `exponent`, then aggregated as they were.

    Sensitivities span three orders of magnitude and are those of the worst perturbation, before any repair and
    recovery, while a cut is none of these: taken at their word they spend all on the few most sensitive layers and
    leave bottlenecks that no fine-tuning mends. Their order is worth having: `benchmarks/results/allocation.md`
    compares exponents on held-out images. Modules are tempered, not groups: a residual stream counts as many times as
    layers write to it.

    Args:
        profile: with the producers' sensitivities.
        groups: from the same model.
        exponent: in [0, 1]: 1 takes nats at their word, 0 leaves the sizes of the cuts and their costs alone.

    Raises:
        UsageError: a group none of whose producers was measured.
    """
    if exponent == 1:
        return profile
    modules = tuple(
        replace(m, mrs=m.mrs**exponent, curve=tuple(loss**exponent for loss in m.curve)) for m in profile.modules
    )
    return aggregate_groups(replace(profile, modules=modules), groups, profile.aggregation)


def _aggregate(group: ChannelGroup, modules: dict[str, ModuleSensitivity], aggregation: str) -> GroupSensitivity:
    rule = _RULES[aggregation]
    names = [
        name for producer in group.producers for name in (producer, *(f"{producer}.{w}" for w in ATTENTION_WEIGHTS))
    ]
    members = [modules[name] for name in names if name in modules]
    if not members:
        raise UsageError(
            f"group {group.name!r} cuts {', '.join(group.producers) or 'no layer'}, none of which is in the "
            "sensitivity profile. Measure the profile on the model that the groups come from."
        )
    curve = tuple(rule(values) for values in zip(*(member.curve for member in members), strict=True))
    return GroupSensitivity(group.name, rule([member.mrs for member in members]), curve)
