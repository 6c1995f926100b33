"""Groups with a higher MRS keep a larger share of their channels."""

from __future__ import annotations

from ..allocation import Problem, Wish
from ..rank_weights import rank_weights


def wished_widths(problem: Problem) -> Wish:
    """Return kept shares that grow linearly with the rank of MRS_g, a literal reading of MRPF (arXiv 2410.15176).

    They range from 0.5 to 1.5 times a scalar that is determined by the budget.

    Raises:
        UsageError: MRS is missing for a group.
    """
    weights = rank_weights(problem)
    return Wish(problem.largest(lambda t: t * weights * problem.dense))
