"""Channels go where the least robustness, by MRS, is lost for the cost that is saved.

Removing the k least important channels of a group is a perturbation of its weights of relative size ρ_g(k), and the
group's MRS curve says how much robust loss a perturbation of that size can cost. So the widths minimise
``Σ_g MRS_g(k_g)`` subject to ``cost(k) <= budget``: at the optimum every group pays the same robust loss per MAC for
its last channel. Neither a sensitive but cheap group nor a dear but insensitive one is spared by rule.

The curves come with each layer's losses tempered before they are summed over the group: see
`sensitivity.groups.tempered`. Our reading of them (neither paper fixes it):

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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import UsageError
from ...sensitivity.groups import tempered
from ...sensitivity.profile import SensitivityProfile
from ..allocation import Floats, Problem, Wish

_ORDER = 2
_LEAST_KEPT_ENERGY = 1e-6
_LEAST_LOSS = 1e-9
_BISECTIONS = 45
_PRICE_STEPS = 200


def wished_widths(problem: Problem) -> Wish:
    """The constrained optimum, by one Lagrange multiplier."""
    profile = problem.needs("a sensitivity profile", problem.profile)
    losses = cut_losses(problem, tempered(profile, problem.groups, problem.section.mrs_exponent))
    form = problem.form
    widths = _equal_prices(losses, problem.floors, problem.dense, form.gradient, form.value, problem.budget)
    return Wish(widths, losses)


def cut_losses(problem: Problem, profile: SensitivityProfile) -> list[Floats]:
    """What each group is expected to cost at each kept count 0..channels: convex, not increasing, 0 at the end.

    Raises:
        UsageError: a group without a curve or without removed fractions.
    """
    fractions = problem.needs("the removed fractions", problem.removed)
    curves = {s.name: s.curve for s in profile.groups}
    problem.covered(curves, "sensitivity profile")
    problem.covered(fractions, "removed fractions")
    losses = []
    for group in problem.groups:
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
