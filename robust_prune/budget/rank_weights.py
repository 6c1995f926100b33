"""Weights of groups by the rank of their MRS."""

from __future__ import annotations

import numpy as np

from .allocation import Floats, Problem


def rank_weights(problem: Problem) -> Floats:
    """Return h(MRS_g), [groups]: linear in the rank, from 0.5 for the least to 1.5 for the most sensitive group.

    Raises:
        UsageError: MRS was not measured for every group.
    """
    profile = problem.needs("a sensitivity profile", problem.profile)
    mrs = {group.name: group.mrs for group in profile.groups}
    problem.covered(mrs, "sensitivity profile")
    values = np.array([mrs[g.name] for g in problem.groups])
    ranks = (values[:, None] > values[None, :]).sum(1) + ((values[:, None] == values[None, :]).sum(1) - 1) / 2
    return 0.5 + ranks / max(len(problem.groups) - 1, 1)
