"""Every group gives up the same share of its channels."""

from __future__ import annotations

from ..allocation import Problem, Wish


def wished_widths(problem: Problem) -> Wish:
    """One keep-fraction for all groups."""
    return Wish(problem.largest(lambda t: t * problem.dense))
