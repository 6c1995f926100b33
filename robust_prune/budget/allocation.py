"""How many channels each group keeps under a budget.

``mrs`` trades robust loss against cost. Removing the k least important channels of a group is a perturbation of its
weights of relative size ρ_g(k), and the group's MRS curve says how much robust loss a perturbation of that size can
cost. So the widths minimise ``Σ_g MRS_g(k_g)`` subject to ``cost(k) <= budget``: at the optimum every group pays the
same robust loss per MAC for its last channel. Neither a sensitive but cheap group nor a dear but insensitive one is
spared by rule.

The curves come with each layer's losses damped before they are summed over the group: see `sensitivity.groups.damped`.
Our reading of them (neither paper fixes it):

- Size is taken relative to the weights that *stay*: tan θ = ρ/sqrt(1-ρ²) with ρ = sin θ. A layer behind a norm only has
  a direction, the cut turns it by θ, and a layer that is cut away altogether is infinitely perturbed. For small cuts
  the two agree. It is what keeps the optimum from emptying whole layers.
- MRS is the loss of the *worst* perturbation of a size, and for small sizes that is its first-order part. A cut has
  hardly any: its channels are chosen for a small one, and signs cancel. What a cut costs is second order. So the curve
  is replaced by the largest function below it that grows at least with the square of the size: linear in log-log
  between the measured radii, quadratic outside them. (The plain curve is concave in k for small cuts, and the optimum
  then is to cut some groups to a quarter and leave the others whole.)
- As a function of k the outcome is replaced by its lower convex hull, so that each further channel costs at least as
  much as the one before and one multiplier settles all groups.

Costs are products of widths, so a channel's price depends on its neighbours. In the logarithms of the widths the
problem is a geometric program (posynomial cost), which is why iterating prices and widths under one multiplier settles.

The other allocations are for comparison: ``rank`` (the plain reading of the paper), ``global`` and ``uniform``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import UsageError
from ..sensitivity.profile import SensitivityProfile
from ..structure.types import ChannelGroup
from .cost import CostModel
from .rounding import check_limits, floor_of, land

Allocation = Literal["mrs", "rank", "global", "uniform"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)

Floats = npt.NDArray[np.float64]
T = TypeVar("T")

_ORDER = 2
_LEAST_KEPT_ENERGY = 1e-6
_LEAST_LOSS = 1e-9
_BISECTIONS = 45
_PRICE_STEPS = 200


def allocate(
    allocation: str,
    groups: Sequence[ChannelGroup],
    cost: CostModel,
    budget: float,
    of: str = "macs",
    profile: SensitivityProfile | None = None,
    scores: Mapping[str, Tensor] | None = None,
    removed_fraction: Mapping[str, Tensor] | None = None,
    *,
    align: int = 8,
    min_keep: float = 0.1,
) -> dict[str, int]:
    """Chooses the widths: within `budget` by at most 1 % of the dense cost below (or, failing that, above).

    - ``mrs``: the constrained optimum above; needs `profile` and `removed_fraction`.
    - ``rank``: keep-fraction grows linearly with the rank of MRS_g, from half to one and a half times one scalar;
      needs `profile`.
    - ``global``: one threshold over score x h(MRS_g), with h the same function of the rank and scores taken relative to
      their group's mean; needs `profile` and `scores`.
    - ``uniform``: one keep-fraction for all groups.

    Args:
        allocation: one of `ALLOCATIONS`.
        groups: that `cost` was made from.
        cost: of the model.
        budget: cost that may remain, in units of `of`.
        of: ``macs``, ``params`` or ``channels``.
        profile: with a `GroupSensitivity` for each group.
        scores: per group, [channels], >= 0, higher is more important.
        removed_fraction: per group, ρ_g(k) for k = 0..channels, [channels + 1], ascending.
        align: widths are multiples of this where possible.
        min_keep: floor as a share of each group, in [0, 1).

    Returns:
        Channels to keep by group name: the floors if the budget is below what they cost, everything if it is above
        the dense cost. Compare `cost.cost(kept, of)` with the budget.

    Raises:
        UsageError: an unknown name, a value out of range, or an input that the allocation needs and lacks.
    """
    if allocation not in ALLOCATIONS:
        raise UsageError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    check_limits(align, min_keep)
    if tuple(g.name for g in groups) != cost.names:
        raise UsageError("the groups are not those that the cost model was made from")
    form = cost.form(of)
    floors = np.array([floor_of(g, min_keep) for g in groups], dtype=np.float64)

    def costs(keep: Floats) -> float:
        return form.value(keep)

    if allocation == "mrs":
        losses = cut_losses(groups, _needed("mrs", "a sensitivity profile", profile), removed_fraction)
        wished = _equal_prices(losses, floors, cost.dense, form.gradient, costs, budget)
    else:
        wish = _one_scalar(allocation, groups, profile, scores)
        wished = _solve_scalar(lambda t: np.clip(wish(t), floors, cost.dense), costs, budget)
        losses = [((np.arange(g.channels + 1) - w) / g.channels) ** 2 for g, w in zip(groups, wished, strict=True)]
    keep = land(groups, wished, losses, form, budget, align=align, min_keep=min_keep)
    return {g.name: int(k) for g, k in zip(groups, keep, strict=True)}


def cut_losses(
    groups: Sequence[ChannelGroup],
    profile: SensitivityProfile,
    removed_fraction: Mapping[str, Tensor] | None,
) -> list[Floats]:
    """What each group is expected to cost at each kept count, the objective of ``mrs``.

    Args:
        groups: all of them in `profile` and `removed_fraction`.
        profile: with curves over at least one radius.
        removed_fraction: per group, ρ_g(k), [channels + 1].

    Returns:
        Per group [channels + 1], indexed by the number of channels *kept*: convex, not increasing, 0 at the end.

    Raises:
        UsageError: a group without a curve or without removed fractions.
    """
    fractions = _needed("mrs", "the removed fractions", removed_fraction)
    curves = {s.name: s.curve for s in profile.groups}
    _check_covered(groups, curves, "sensitivity profile")
    _check_covered(groups, fractions, "removed fractions")
    losses = []
    for group in groups:
        removed = fractions[group.name].detach().double().cpu().numpy()
        if removed.shape != (group.channels + 1,):
            raise UsageError(f"group {group.name!r} needs {group.channels + 1} removed fractions, got {removed.shape}")
        radii = _tangent(np.array(profile.radii, dtype=np.float64))
        loss = _curve_at(_tangent(removed), radii, np.array(curves[group.name], dtype=np.float64))
        losses.append(_lower_hull(loss)[::-1].copy())
    return losses


def _tangent(sine: Floats) -> Floats:
    """Size of the cut relative to what stays, from its size relative to the whole."""
    energy = np.clip(sine, 0.0, 1.0) ** 2
    return np.sqrt(energy / np.maximum(1.0 - energy, _LEAST_KEPT_ENERGY))


def _curve_at(sizes: Floats, radii: Floats, curve: Floats) -> Floats:
    """The loss of cuts of the given `sizes`: the largest function below the MRS curve that is at least quadratic."""
    rising = np.maximum(np.maximum.accumulate(curve), _LEAST_LOSS)
    relative = np.minimum.accumulate((rising / radii**_ORDER)[::-1])[::-1]
    at = np.log(np.maximum(sizes, 1e-12))
    # np.interp holds the end values outside the radii, which is exactly the quadratic continuation.
    return np.exp(np.interp(at, np.log(radii), np.log(relative))) * sizes**_ORDER


def _lower_hull(values: Floats) -> Floats:
    """Largest convex function of the index that is nowhere above `values`."""
    hull: list[int] = []
    for i in range(len(values)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) < (values[i] - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    return np.interp(np.arange(len(values)), hull, values[hull])


def _equal_prices(
    losses: Sequence[Floats],
    floors: Floats,
    dense: Floats,
    gradient: Callable[[Floats], Floats],
    costs: Callable[[Floats], float],
    budget: float,
) -> Floats:
    """Widths at which every group pays the same loss per cost (one multiplier, by bisection), real-valued."""
    response = _Response(losses)
    low, high = -80.0, 80.0
    keep = dense.copy()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        keep = response.settle(np.exp(middle), keep, floors, dense, gradient)
        low, high = (middle, high) if costs(keep) > budget else (low, middle)
    return response.settle(np.exp(high), keep, floors, dense, gradient)


class _Response:
    """What each group keeps when cost has a price: where its marginal loss equals price x marginal cost."""

    _GRID = 129

    def __init__(self, losses: Sequence[Floats]) -> None:
        # Marginal losses sampled on one grid of kept fractions, so that all groups answer in one array operation.
        self._grid = np.linspace(0.0, 1.0, self._GRID)
        rows = []
        for loss in losses:
            channels = len(loss) - 1
            saved = np.maximum(loss[:-1] - loss[1:], 1e-300)  # by keeping one channel more: falls with the count
            rows.append(np.log(np.interp(self._grid, (np.arange(channels) + 0.5) / channels, saved)))
        self._marginal = np.array(rows)

    def settle(
        self, price: float, start: Floats, floors: Floats, dense: Floats, gradient: Callable[[Floats], Floats]
    ) -> Floats:
        """Widths and marginal costs that agree with each other, by damped iteration in log widths."""
        keep = start
        for _ in range(_PRICE_STEPS):
            wanted = np.clip(self._answer(price * np.maximum(gradient(keep), 1e-12)) * dense, floors, dense)
            # Each group's price has elasticity at most one in its neighbours' widths; half steps cannot oscillate.
            following = np.sqrt(keep * wanted)
            if np.abs(following / keep - 1).max(initial=0.0) < 1e-4:
                return following
            keep = following
        return keep

    def _answer(self, marginal_cost: Floats) -> Floats:
        """Kept fraction at which the marginal loss falls below the marginal cost, between grid points."""
        bar = np.log(marginal_cost)[:, None]
        above = (self._marginal > bar).sum(axis=1)
        left = np.clip(above - 1, 0, self._GRID - 2)
        rows = np.arange(len(left))
        first, second = self._marginal[rows, left], self._marginal[rows, left + 1]
        span = np.where(first > second, first - second, 1.0)
        share = np.clip((first - bar[:, 0]) / span, 0.0, 1.0)
        inside = self._grid[left] + share * (self._grid[1] - self._grid[0])
        return np.where(above == 0, 0.0, np.where(above == self._GRID, 1.0, inside))


def _one_scalar(
    allocation: str,
    groups: Sequence[ChannelGroup],
    profile: SensitivityProfile | None,
    scores: Mapping[str, Tensor] | None,
) -> Callable[[float], Floats]:
    """Widths as a function of one scalar in [0, inf) that they grow with."""
    channels = np.array([g.channels for g in groups], dtype=np.float64)
    if allocation == "uniform":
        return lambda t: t * channels
    weights = _rank_weights(groups, _needed(allocation, "a sensitivity profile", profile))
    if allocation == "rank":
        return lambda t: t * weights * channels
    given = _needed(allocation, "channel scores", scores)
    _check_covered(groups, given, "channel scores")
    importance = []
    for group, weight in zip(groups, weights, strict=True):
        score = given[group.name].detach().double().cpu().numpy()
        importance.append(np.sort(weight * score / max(float(score.mean()), 1e-300)))
    return lambda t: np.array([len(v) - np.searchsorted(v, 1 / max(t, 1e-12), "right") for v in importance], float)


def _rank_weights(groups: Sequence[ChannelGroup], profile: SensitivityProfile) -> Floats:
    """h(MRS_g): from 0.5 for the least to 1.5 for the most sensitive group, by rank."""
    mrs = {s.name: s.mrs for s in profile.groups}
    _check_covered(groups, mrs, "sensitivity profile")
    values = np.array([mrs[g.name] for g in groups])
    ranks = (values[:, None] > values[None, :]).sum(1) + ((values[:, None] == values[None, :]).sum(1) - 1) / 2
    return 0.5 + ranks / max(len(groups) - 1, 1)


def _solve_scalar(widths: Callable[[float], Floats], costs: Callable[[Floats], float], budget: float) -> Floats:
    """Widths at the largest scalar whose cost is within the budget."""
    low, high = -30.0, 30.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if costs(widths(float(np.exp(middle)))) > budget else (middle, high)
    return widths(float(np.exp(low)))


def _needed(allocation: str, what: str, value: T | None) -> T:
    if value is None:
        raise UsageError(f"allocation {allocation!r} needs {what}, got none")
    return value


def _check_covered(groups: Sequence[ChannelGroup], known: Mapping[str, object], what: str) -> None:
    missing = [g.name for g in groups if g.name not in known]
    if missing:
        raise UsageError(
            f"the {what} lack group {missing[0]!r} and {len(missing) - 1} more. Make them for the groups of this model."
        )
