"""Aggregation of the sensitivity of modules over coupled groups."""

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
    """Raise UsageError unless `aggregation` is one of `AGGREGATIONS`."""
    if aggregation not in _RULES:
        raise UsageError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")


def aggregate_groups(
    profile: SensitivityProfile, groups: Sequence[ChannelGroup], aggregation: str = "sum"
) -> SensitivityProfile:
    """Return the profile with one MRS and one curve for each of `groups`, replacing those that it had.

    A group's members are its producers, the layers whose output channels it cuts.

    - ``sum`` (default): cutting the group perturbs all producers at once. If each stays within its own ball of
      relative radius ρ, the largest joint increase of the loss is, to first order, the sum of the members' MRS.
    - ``quadrature``: square root of the sum of squares, as for uncorrelated members; below the worst case.
    - ``max``: the most sensitive member alone; a lower bound of the joint worst case.
    - ``mean``: for comparison; it rates a residual stream with many producers no higher than a single layer.

    Args:
        profile: profile that contains the producers.
        groups: groups of the same model.
        aggregation: one of `AGGREGATIONS`.

    Raises:
        UsageError: the aggregation is unknown, or none of a group's producers was measured.
    """
    check_aggregation(aggregation)
    modules = {module.name: module for module in profile.modules}
    found = tuple(_aggregate(group, modules, aggregation) for group in groups)
    return replace(profile, aggregation=aggregation, groups=found)


def tempered(profile: SensitivityProfile, groups: Sequence[ChannelGroup], exponent: float) -> SensitivityProfile:
    """Return the profile with each module's MRS raised to `exponent`, aggregated over `groups` with the same rule.

    Raw MRS spans three orders of magnitude and assumes a worst-case perturbation without repair or fine-tuning. An
    allocation by raw MRS spends the budget on the few most sensitive layers and starves bottlenecks that fine-tuning
    cannot recover. `benchmarks/results/allocation.md` compares exponents on held-out images. The exponent is applied to
    modules before aggregation, so that a residual stream counts once for each layer that writes to it.

    Args:
        profile: profile that contains the producers.
        groups: groups of the same model.
        exponent: in [0, 1]: 1 keeps MRS in nats; 0 ignores MRS, so that only the sizes and costs of cuts count.

    Raises:
        UsageError: none of a group's producers was measured.
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
