"""Channels are removed where the loss of robustness, estimated by MRS, is smallest for the cost that is saved.

Removing the k least important channels of a group perturbs its weights by a relative size ρ_g(k), and the group's MRS
curve gives the robust loss that a perturbation of this size can cost. The widths minimise ``Σ_g MRS_g(k_g)`` subject to
``cost(k) <= budget``. At the optimum the last channel removed from every group costs the same robust loss per MAC, so
no group is exempt, neither a sensitive one of low cost nor an insensitive one of high cost.

MRS of each layer is raised to `mrs_exponent` before it is summed over the group; see `aggregation.tempered`. The curves
are then interpreted as follows (our own reading; no paper specifies it):

- The size of a cut is taken relative to the weights that are *kept*: tan θ = ρ/sqrt(1-ρ²), where ρ = sin θ. For a layer
  followed by a norm only the direction of its weights matters; the cut turns it by θ, and removing the layer is an
  infinite perturbation. For small cuts both sizes agree. This prevents the optimum from emptying layers.
- MRS is the loss of the *worst* perturbation of a size, which is a first-order effect for small sizes. A cut has almost
  no first-order effect, since its channels are selected for a small one and signs cancel; its cost is of second order.
  Therefore the curve is replaced by the largest function below it that grows at least with the square of the size. The
  function is linear in log-log coordinates between the measured radii and quadratic outside them. (The raw curve is
  concave in k for small cuts, and its optimum cuts some groups to a quarter and leaves the others unpruned.)
- As a function of k the result is replaced by its lower convex hull, so that each further channel costs at least as
  much as the one before, and one Lagrange multiplier determines all widths.

Costs are products of widths, so the cost of a channel depends on the widths of neighbouring groups. In the logarithms
of the widths the problem is a geometric program (its cost is a posynomial), so iterating between marginal costs and
widths under one multiplier converges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import UsageError
from ...sensitivity.aggregation import tempered
from ...sensitivity.profile import SensitivityProfile
from ..allocation import Floats, Problem, Wish

_ORDER = 2
_LEAST_KEPT_ENERGY = 1e-6
_LEAST_LOSS = 1e-9
_BISECTIONS = 45
_PRICE_STEPS = 200


def wished_widths(problem: Problem) -> Wish:
    """Return the widths of the constrained optimum, found with one Lagrange multiplier, and the expected losses.

    Raises:
        UsageError: MRS or the removed fractions are missing for a group.
    """
    profile = problem.needs("a sensitivity profile", problem.profile)
    losses = cut_losses(problem, tempered(profile, problem.groups, problem.section.mrs_exponent))
    return Wish(equal_prices(losses, problem), losses)


def cut_losses(problem: Problem, profile: SensitivityProfile) -> list[Floats]:
    """Return the expected loss of each group at each kept count 0..channels, [channels + 1].

    Each is convex and not increasing, and 0 for the full width.

    Raises:
        UsageError: a group has no MRS curve or no removed fractions.
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
        losses.append(lower_hull(loss)[::-1].copy())
    return losses


def _tangent(sine: Floats) -> Floats:
    """Convert sizes of cuts relative to all weights into sizes relative to the kept weights."""
    energy = np.clip(sine, 0.0, 1.0) ** 2
    return np.sqrt(energy / np.maximum(1.0 - energy, _LEAST_KEPT_ENERGY))


def _curve_at(sizes: Floats, radii: Floats, curve: Floats) -> Floats:
    """Return the loss at `sizes`: the largest function below the MRS curve that grows at least quadratically."""
    rising = np.maximum(np.maximum.accumulate(curve), _LEAST_LOSS)
    relative = np.minimum.accumulate((rising / radii**_ORDER)[::-1])[::-1]
    at = np.log(np.maximum(sizes, 1e-12))
    # np.interp is constant outside the radii, so the loss is quadratic there.
    return np.exp(np.interp(at, np.log(radii), np.log(relative))) * sizes**_ORDER


def lower_hull(values: Floats) -> Floats:
    """Return the largest convex function of the index that is nowhere above `values`."""
    hull: list[int] = []
    for i in range(len(values)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) < (values[i] - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    return np.interp(np.arange(len(values)), hull, values[hull])


def equal_prices(losses: Sequence[Floats], problem: Problem) -> Floats:
    """Return real-valued widths of equal marginal loss per cost, by bisection on the Lagrange multiplier.

    Args:
        losses: loss of each group at each kept count 0..channels, convex and not increasing.
        problem: budget, cost and limits of the widths.
    """
    response = _Response(losses)
    low, high = -80.0, 80.0
    keep, floors, dense, form = problem.dense.copy(), problem.floors, problem.dense, problem.form
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        keep = response.settle(np.exp(middle), keep, floors, dense, form.gradient)
        low, high = (middle, high) if form.value(keep) > problem.budget else (low, middle)
    return response.settle(np.exp(high), keep, floors, dense, form.gradient)


class _Response:
    """Widths as a function of the multiplier: each group's marginal loss equals multiplier x marginal cost."""

    _GRID = 129

    def __init__(self, losses: Sequence[Floats]) -> None:
        # Marginal losses are sampled on one grid of kept fractions, so that one array operation serves all groups.
        self._grid = np.linspace(0.0, 1.0, self._GRID)
        rows = []
        for loss in losses:
            channels = len(loss) - 1
            saved = np.maximum(loss[:-1] - loss[1:], 1e-300)  # by keeping one channel more; decreases with the count
            rows.append(np.log(np.interp(self._grid, (np.arange(channels) + 0.5) / channels, saved)))
        self._marginal = np.array(rows)

    def settle(
        self, price: float, start: Floats, floors: Floats, dense: Floats, gradient: Callable[[Floats], Floats]
    ) -> Floats:
        """Return widths consistent with the marginal costs at these widths, by damped iteration in log widths."""
        keep = start
        for _ in range(_PRICE_STEPS):
            wanted = np.clip(self._answer(price * np.maximum(gradient(keep), 1e-12)) * dense, floors, dense)
            # A marginal cost has elasticity of at most one in the neighbours' widths, so half steps do not oscillate.
            following = np.sqrt(keep * wanted)
            if np.abs(following / keep - 1).max(initial=0.0) < 1e-4:
                return following
            keep = following
        return keep

    def _answer(self, marginal_cost: Floats) -> Floats:
        """Return the kept fraction at which the marginal loss falls below the marginal cost, by interpolation."""
        bar = np.log(marginal_cost)[:, None]
        above = (self._marginal > bar).sum(axis=1)
        left = np.clip(above - 1, 0, self._GRID - 2)
        rows = np.arange(len(left))
        first, second = self._marginal[rows, left], self._marginal[rows, left + 1]
        span = np.where(first > second, first - second, 1.0)
        share = np.clip((first - bar[:, 0]) / span, 0.0, 1.0)
        inside = self._grid[left] + share * (self._grid[1] - self._grid[0])
        return np.where(above == 0, 0.0, np.where(above == self._GRID, 1.0, inside))
