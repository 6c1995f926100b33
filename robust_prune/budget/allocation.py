"""Allocation of a budget: how many channels each group keeps. `catalogue.ALLOCATIONS` lists the allocations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..catalogue import ALLOCATIONS
from ..errors import UsageError
from ..models import user_file
from ..recipe import PruningSection
from ..sensitivity.profile import SensitivityProfile
from ..structure.branches import Removable
from ..structure.types import ChannelGroup
from .analysis import Analysis
from .cost import QuadraticForm
from .cut_losses import CutLosses
from .rounding import floor_of, round_to_budget

Floats = npt.NDArray[np.float64]
T = TypeVar("T")

_BISECTIONS = 45


@dataclass(frozen=True)
class Problem:
    """Input of an allocation.

    Attributes:
        groups: groups of the model.
        form: cost as a function of the widths.
        budget: largest allowed cost, in the units of `form`.
        floors: smallest number of channels that each group may keep, [groups].
        dense: channels of each group, [groups].
        section: pruning section of the recipe.
        profile: sensitivity profile with the MRS of each group, if it was measured.
        scores: scores of the channels by group name, >= 0, higher is more important; None without scores.
        removed: ρ_g(k) for k = 0..channels by group name, ascending, if it was measured; see `Analysis`.
        cut_losses: losses of real cuts by group name, if they were measured.
        branches: groups that are residual branches and may keep no channel, by name.
    """

    groups: Sequence[ChannelGroup]
    form: QuadraticForm
    budget: float
    floors: Floats
    dense: Floats
    section: PruningSection
    profile: SensitivityProfile | None = None
    scores: Mapping[str, Tensor] | None = None
    removed: Mapping[str, Tensor] | None = None
    cut_losses: CutLosses | None = None
    branches: Mapping[str, Removable] = field(default_factory=dict)

    def needs(self, what: str, value: T | None) -> T:
        """Return `value`, which the allocation requires.

        Args:
            what: name of the input, for the message.
            value: the input, or None if it is missing.

        Raises:
            UsageError: the value is None.
        """
        if value is None:
            raise UsageError(f"allocation {self.section.allocation!r} needs {what}, got none")
        return value

    def covered(self, known: Mapping[str, object], what: str) -> None:
        """Raise UsageError unless `known` contains every group."""
        missing = [g.name for g in self.groups if g.name not in known]
        if missing:
            raise UsageError(
                f"the {what} lack group {missing[0]!r} and {len(missing) - 1} more. Make them for the groups of this "
                "model."
            )

    def without(self, names: Collection[str]) -> Problem:
        """Return the problem in which the groups `names` keep no channel."""
        at = [i for i, group in enumerate(self.groups) if group.name not in names]
        groups = [self.groups[i] for i in at]
        return replace(self, groups=groups, form=self.form.part(at), floors=self.floors[at], dense=self.dense[at])

    def largest(self, widths: Callable[[float], Floats]) -> Floats:
        """Return the largest widths within the budget, found by bisection.

        Args:
            widths: maps a scalar in (0, inf) to widths [groups] that do not decrease with it.
        """
        low, high = -30.0, 30.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = np.clip(widths(float(np.exp(middle))), self.floors, self.dense)
            low, high = (low, middle) if self.form.value(found) > self.budget else (middle, high)
        return np.clip(widths(float(np.exp(low))), self.floors, self.dense)


@dataclass(frozen=True)
class Wish:
    """Output of an allocation, before widths are rounded to integers.

    Attributes:
        widths: real-valued widths between the floors and the dense widths, [groups]; 0 for a group that goes with a
            residual branch.
        losses: expected loss of each group at each kept count 0..channels, [channels + 1], which rounding minimises.
            None prefers the integers nearest to `widths`.
    """

    widths: Floats
    losses: Sequence[Floats] | None = None


def allocate(analysis: Analysis, section: PruningSection, budget: float) -> dict[str, int]:
    """Choose integer widths whose cost meets the budget.

    The cost is at most 1 % of the dense cost below the budget or, if no such widths are found, above it.

    Args:
        analysis: analysis of the model.
        section: allocation, metric of the budget, rounding and minimum width.
        budget: remaining cost, in units of ``section.metric``.

    Returns:
        Channels to keep by group name: the minimum widths if the budget is below their cost, the dense widths if it is
        above the dense cost. Compare `cost.cost(kept, metric)` with the budget.

    Raises:
        UsageError: the allocation or metric is unknown, the allocation returns something else than a `Wish`, or an
            input that it needs is missing.
    """
    groups, cost = analysis.search.groups, analysis.cost
    if tuple(g.name for g in groups) != cost.names:
        raise UsageError("the groups are not those that the cost model was made from")
    floors = np.array([floor_of(g, section.min_keep) for g in groups], dtype=np.float64)
    problem = Problem(
        groups, cost.form(section.metric), budget, floors, cost.dense.copy(), section, analysis.profile,
        analysis.scores, analysis.removed, analysis.cut_losses, analysis.branches,
    )  # fmt: skip
    wish = _wished(problem)
    widths = np.asarray(wish.widths, dtype=np.float64)
    within = [branch.modules for branch in analysis.branches.values()]
    gone = {
        g.name for g, width in zip(groups, widths, strict=True)
        if width == 0 and any(modules.issuperset(g.producers) for modules in within)
    }  # fmt: skip
    return dict.fromkeys(sorted(gone), 0) | _rounded(problem, wish, widths, gone)


def _rounded(problem: Problem, wish: Wish, widths: Floats, gone: Collection[str]) -> dict[str, int]:
    """Return integer widths of all groups but `gone`."""
    at = [i for i, group in enumerate(problem.groups) if group.name not in gone]
    problem, section = problem.without(gone), problem.section
    groups, widths = problem.groups, widths[at]
    if not groups:
        return {}
    losses = (
        [wish.losses[i] for i in at]
        if wish.losses is not None
        else [((np.arange(g.channels + 1) - w) / g.channels) ** 2 for g, w in zip(groups, widths, strict=True)]
    )
    keep = round_to_budget(
        groups, widths, losses, problem.form, problem.budget, round_to=section.round_to, min_keep=section.min_keep
    )  # fmt: skip
    return {g.name: int(k) for g, k in zip(groups, keep, strict=True)}


def _wished(problem: Problem) -> Wish:
    """Return what the allocation of a problem's section gives, checked.

    Raises:
        UsageError: as `allocate`.
    """
    groups, section = problem.groups, problem.section
    function = ALLOCATIONS.load(section.allocation)
    with user_file.reported(section.allocation):
        wish = function(problem)
    if not isinstance(wish, Wish):
        raise UsageError(f"allocation {section.allocation!r} must return a Wish, got {wish!r}")
    with user_file.reported(section.allocation):
        widths = np.asarray(wish.widths, dtype=np.float64)
    if widths.shape != (len(groups),) or not np.isfinite(widths).all():
        raise UsageError(f"allocation {section.allocation!r} must return {len(groups)} finite widths, got {widths}")
    if wish.losses is not None and [np.shape(row) for row in wish.losses] != [(g.channels + 1,) for g in groups]:
        raise UsageError(
            f"allocation {section.allocation!r} must return losses [channels + 1] for each of {len(groups)} groups, "
            f"got {[np.shape(row) for row in wish.losses]}"
        )
    return wish
