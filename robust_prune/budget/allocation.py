"""How many channels each group keeps under a budget; which allocations there are, `catalogue.ALLOCATIONS` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..catalogue import ALLOCATIONS
from ..errors import UsageError
from ..recipe import PruningSection
from ..sensitivity.profile import SensitivityProfile
from ..structure.types import ChannelGroup
from .analysis import Analysis
from .cost import QuadraticForm
from .rounding import floor_of, round_to_budget

Floats = npt.NDArray[np.float64]
T = TypeVar("T")

_BISECTIONS = 45


@dataclass(frozen=True)
class Problem:
    """What an allocation is given. Arrays are over `groups`, [groups].

    Attributes:
        groups: of the model.
        form: what is budgeted, as a function of the widths.
        budget: the most that it may come to.
        floors: fewest channels that each group may keep.
        dense: channels of each group.
        section: the recipe's settings of the cut.
        profile: MRS by group, if it was measured.
        scores: of channels by group, >= 0, higher is more important, if there are any.
        removed: ρ_g(k) for k = 0..channels by group, ascending, if it was measured: see `Analysis`.
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

    def needs(self, what: str, value: T | None) -> T:
        """`value`, which the allocation cannot do without.

        Raises:
            UsageError: it is missing.
        """
        if value is None:
            raise UsageError(f"allocation {self.section.allocation!r} needs {what}, got none")
        return value

    def covered(self, known: Mapping[str, object], what: str) -> None:
        """Raises UsageError unless `known` has all groups."""
        missing = [g.name for g in self.groups if g.name not in known]
        if missing:
            raise UsageError(
                f"the {what} lack group {missing[0]!r} and {len(missing) - 1} more. Make them for the groups of this "
                "model."
            )

    def largest(self, widths: Callable[[float], Floats]) -> Floats:
        """Of widths that grow with one scalar in (0, inf), the largest within the budget, by bisection."""
        low, high = -30.0, 30.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = np.clip(widths(float(np.exp(middle))), self.floors, self.dense)
            low, high = (low, middle) if self.form.value(found) > self.budget else (middle, high)
        return np.clip(widths(float(np.exp(low))), self.floors, self.dense)


@dataclass(frozen=True)
class Wish:
    """What an allocation answers, before widths are made whole.

    Attributes:
        widths: real-valued, within floors and dense widths, [groups].
        losses: by group, what each kept count 0..channels is expected to cost, [channels + 1]: what whole widths are
            chosen by. None prefers those that are nearest to `widths`.
    """

    widths: Floats
    losses: Sequence[Floats] | None = None


def allocate(analysis: Analysis, section: PruningSection, budget: float) -> dict[str, int]:
    """Chooses the widths: within `budget` by at most 1 % of the dense cost below (or, failing that, above).

    Args:
        analysis: of the model.
        section: allocation, what the budget counts, multiples of widths, and the floor.
        budget: cost that may remain, in units of ``section.metric``.

    Returns:
        Channels to keep, by group name. They are the floors if the budget is below what they cost, and everything if it
        is above the dense cost. Compare `cost.cost(kept, metric)` with the budget.

    Raises:
        UsageError: an unknown allocation, one that answers in another form, or an input that it needs and lacks.
    """
    groups, cost = analysis.search.groups, analysis.cost
    if tuple(g.name for g in groups) != cost.names:
        raise UsageError("the groups are not those that the cost model was made from")
    floors = np.array([floor_of(g, section.min_keep) for g in groups], dtype=np.float64)
    problem = Problem(
        groups, cost.form(section.metric), budget, floors, cost.dense, section, analysis.profile, analysis.scores,
        analysis.removed,
    )  # fmt: skip
    wish = ALLOCATIONS.load(section.allocation)(problem)
    if not isinstance(wish, Wish) or np.shape(wish.widths) != (len(groups),):
        raise UsageError(f"allocation {section.allocation!r} must return a Wish with {len(groups)} widths, got {wish}")
    losses = wish.losses or [
        ((np.arange(g.channels + 1) - w) / g.channels) ** 2 for g, w in zip(groups, wish.widths, strict=True)
    ]
    keep = round_to_budget(
        groups, wish.widths, losses, problem.form, budget, round_to=section.round_to, min_keep=section.min_keep
    )  # fmt: skip
    return {g.name: int(k) for g, k in zip(groups, keep, strict=True)}
