"""The more sensitive a group is, by MRS, the larger the share of its channels that stays."""

from __future__ import annotations

from ..allocation import Problem, Wish
from ..rank_weights import rank_weights


def wished_widths(problem: Problem) -> Wish:
    """Keep-fractions that grow linearly with the rank of MRS_g: the plain reading of MRPF (arXiv 2410.15176).

    They run from half to one and a half times one scalar, which the budget settles.
    """
    weights = rank_weights(problem)
    return Wish(problem.largest(lambda t: t * weights * problem.dense))
