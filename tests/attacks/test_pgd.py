"""PGD and N-FGSM stay inside the threat model and find the worst point of a linear model."""

from __future__ import annotations

import pytest
import torch
from builders.attacked import conv_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel, frozen_eval, n_fgsm, pgd
from robust_prune.attacks.pgd import cross_entropy_objective, default_step_size


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.floats(0, 1),
    steps=st.integers(0, 3),
    keep_best=st.booleans(),
    seed=st.integers(0, 100),
)
def test_pgd_stays_in_the_ball_and_in_the_pixel_range(norm, epsilon, steps, keep_best, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 3, 8, 8, generator=generator)
    y = torch.randint(5, (3,), generator=generator)
    threat = ThreatModel(norm, epsilon)
    with frozen_eval(conv_model()) as model:
        x_adv = pgd(model, x, y, threat, steps=steps, generator=generator, keep_best=keep_best)
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= epsilon + 1e-6 * (1 + epsilon)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_keep_best_never_ends_below_the_loss_of_its_start(norm):
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
    threat = ThreatModel(norm, 0.1)
    with frozen_eval(conv_model()) as model, torch.no_grad():
        before = cross_entropy_objective(y)(model(x))
        # An absurd step size makes the iterates jump about; only keeping the best protects the result.
        x_adv = pgd(model, x, y, threat, steps=3, step_size=10.0, start=x)
        assert (cross_entropy_objective(y)(model(x_adv)) >= before).all()


def test_pgd_finds_the_corner_that_is_worst_for_a_linear_model():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x, y = torch.full((4, 3, 2, 2), 0.5), torch.tensor([0, 1, 0, 1])
    epsilon = 0.1
    weight = linear[1].weight
    towards_wrong = torch.where(y[:, None] == 0, weight[1] - weight[0], weight[0] - weight[1]).view(4, 3, 2, 2)
    with frozen_eval(linear):
        x_adv = pgd(linear, x, y, ThreatModel("linf", epsilon), steps=20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(x_adv, x + epsilon * towards_wrong.sign(), atol=1e-6)


def test_more_restarts_only_raise_the_loss():
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 5
    objective = cross_entropy_objective(y)
    with frozen_eval(conv_model()) as model, torch.no_grad():
        losses = [
            objective(
                model(
                    pgd(
                        model,
                        x,
                        y,
                        ThreatModel(),
                        steps=2,
                        restarts=restarts,
                        generator=torch.Generator().manual_seed(3),
                    )
                )
            )
            for restarts in (1, 4)
        ]
    assert (losses[1] >= losses[0] - 1e-6).all()
    assert (losses[1] > losses[0]).any()


def test_n_fgsm_goes_beyond_the_ball_but_not_beyond_noise_plus_step():
    x, y = torch.full((8, 3, 8, 8), 0.5), torch.arange(8) % 5
    threat = ThreatModel("linf", 0.02)
    with frozen_eval(conv_model()) as model:
        x_adv = n_fgsm(model, x, y, threat, generator=torch.Generator().manual_seed(0))
    size = (x_adv - x).abs().amax()
    assert threat.epsilon < size <= 3 * threat.epsilon + 1e-6


def test_step_size_crosses_the_ball_but_is_never_longer_than_it():
    threat = ThreatModel("linf", 8 / 255)
    assert default_step_size(threat, 20) == pytest.approx(2 / 255)
    assert default_step_size(threat, 1) == threat.epsilon


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_infinite_slope_leaves_the_images_finite(norm: str) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp_min(0).sqrt().mean((2, 3))

    x = torch.zeros(4, 3, 4, 4)
    found = pgd(Root(), x, torch.arange(4) % 3, ThreatModel(norm, 0.1), steps=3, start=x)
    assert found.isfinite().all() and (found - x).abs().max() <= 0.1 + 1e-6
