"""The least important channels of the network, weighted by the rank of MRS, are removed."""

from __future__ import annotations

import numpy as np

from ..allocation import Floats, Problem, Wish
from ..rank_weights import rank_weights


def wished_widths(problem: Problem) -> Wish:
    """Return widths by one threshold on score x h(MRS_g); scores are divided by the group's mean, h is `rank_weights`.

    Raises:
        UsageError: MRS or channel scores are missing for a group.
    """
    weights = rank_weights(problem)
    scores = problem.needs("channel scores", problem.scores)
    problem.covered(scores, "channel scores")
    importance = []
    for group, weight in zip(problem.groups, weights, strict=True):
        score = scores[group.name].detach().double().cpu().numpy()
        importance.append(np.sort(weight * score / max(float(score.mean()), 1e-300)))

    def widths(t: float) -> Floats:
        return np.array([len(v) - np.searchsorted(v, 1 / max(t, 1e-12), "right") for v in importance], float)

    return Wish(problem.largest(widths))
