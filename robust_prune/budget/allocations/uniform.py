"""The same share of channels is removed from every group."""

from __future__ import annotations

from ..allocation import Problem, Wish


def wished_widths(problem: Problem) -> Wish:
    """Return the same kept share for all groups, as large as the budget allows."""
    return Wish(problem.largest(lambda t: t * problem.dense))
