"""The ball: projections and starts."""

from __future__ import annotations

import torch

from robust_prune.attacks import ThreatModel, project, random_start


def test_projection_is_the_nearest_point_in_l2():
    x = torch.full((1, 1, 1, 2), 0.5)
    far = torch.tensor([[[[0.5 + 0.3, 0.5 + 0.4]]]])
    assert torch.allclose(project(far, x, ThreatModel("l2", 0.25)), torch.tensor([[[[0.65, 0.7]]]]), atol=1e-6)


def test_random_start_fills_the_linf_ball_evenly():
    x = torch.full((1, 1, 100, 100), 0.5)
    start = random_start(x, ThreatModel("linf", 0.1), torch.Generator().manual_seed(0))
    assert abs(float((start - x).mean())) < 0.003
    assert abs(float((start - x).std()) - 0.1 / 3**0.5) < 0.002
