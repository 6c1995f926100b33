"""The input gradient against finite differences: cheats are told from honest oddities."""

from __future__ import annotations

import sys

import pytest
import torch
from builders.evaluation_sample import THREAT, Tiny, evaluated
from builders.places import BENCHMARKS
from torch import Tensor, nn

from robust_prune.attacks import frozen_eval
from robust_prune.data.base import TensorImages
from robust_prune.evaluation import gradient_test
from robust_prune.evaluation.flags import behaviour_flags, label_flag, usual_scale
from robust_prune.evaluation.gradient_test import agreement

sys.path.insert(0, str(BENCHMARKS))

import cheating_models
import odd_models

OF_TEN_CLASSES = "two classes"


def looked_at(model: nn.Module, images: TensorImages) -> list[str]:
    with frozen_eval(model.eval()):
        return behaviour_flags(model, images.images[:64].float() / 255, images.labels[:64])


@pytest.mark.parametrize("name", [name for name in cheating_models.CHEATS if name not in cheating_models.DURING_ATTACK])
def test_every_cheat_rings_an_alarm_before_any_attack(trained: Tiny, images: TensorImages, name: str) -> None:
    assert looked_at(cheating_models.CHEATS[name](trained), images)


@pytest.mark.parametrize("name", [name for name in odd_models.HONEST if name != OF_TEN_CLASSES])
def test_honest_oddities_ring_none(trained: Tiny, images: TensorImages, name: str) -> None:
    assert looked_at(odd_models.HONEST[name](trained), images) == []


def test_agreement_is_the_cosine_of_predicted_and_measured_changes() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1))

    torch.manual_seed(0)
    x, y = torch.rand(16, 3, 8, 8), torch.zeros(16, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    honest = Linear()
    assert agreement(honest, x, y, generator=generator).min() > 0.999

    half = torch.arange(192).view(1, 3, 8, 8) % 2 == 0

    class Blind(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.where(half, x, x.detach()).flatten(1))

    blind = Blind()
    blind.load_state_dict(honest.state_dict())
    found = torch.cat([agreement(blind, x, y, generator=generator) for _ in range(8)]).mean().item()
    assert found == pytest.approx(0.5**0.5, abs=0.05), "the square root of the share that is seen"

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 3) + 0 * x.sum()

    assert agreement(Constant(), x, y, generator=generator).tolist() == [0.0] * 16


@pytest.mark.parametrize(("short", "rings"), [(0.95, False), (0.7, True)])
def test_where_the_gradient_changes_quickly_shorter_differences_decide(
    trained: Tiny, images: TensorImages, monkeypatch: pytest.MonkeyPatch, short: float, rings: bool
) -> None:
    asked: list[float] = []

    def scripted(model: nn.Module, x: Tensor, y: Tensor, step: float, generator: object) -> Tensor:
        asked.append(step)
        return torch.full((len(x),), 0.7 if step == gradient_test.STEP else short)

    monkeypatch.setattr(gradient_test, "agreement", scripted)
    flags = gradient_test.gradient_flags(trained, images.images[:32].float() / 255, images.labels[:32])
    assert bool(flags) == rings and asked[:2] == [gradient_test.STEP, gradient_test.SHORT_STEP]


def test_large_images_get_blocks_of_equal_signs() -> None:
    class Coarse(nn.Module):
        """Sees means of 7x7 pixels only, in bfloat16: single pixels drown in rounding."""

        def forward(self, x: Tensor) -> Tensor:
            means = nn.functional.avg_pool2d(x, 7).mean((1, 2)).bfloat16().float()
            return torch.stack([means[:, 0], 20 * means.mean(1), 0.5 + 0 * means[:, 0]], 1)

    x = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert agreement(Coarse(), x, torch.zeros(8, dtype=torch.long), generator=generator).median() > 0.8


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_scale_that_hides_the_gradient_is_taken_back(trained: Tiny, images: TensorImages, factor: float) -> None:
    class Scaled(odd_models.Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return factor * super().forward(x)

    honest = evaluated(trained, images, THREAT, steps=10, restarts=2, precision="fp32")
    card = evaluated(Scaled(trained).eval(), images, THREAT, steps=10, restarts=2, precision="fp32")
    assert abs(card.robust.correct - honest.robust.correct) <= 2
    assert any("attacks saw the logits times" in flag for flag in card.flags)


def test_usual_logits_keep_their_scale() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    assert usual_scale(logits) == usual_scale(20 * logits) == 1.0
    assert usual_scale(1e3 * logits) == pytest.approx(1e-3 * usual_scale(1e6 * logits) * 1e6, rel=1e-4)
    assert usual_scale(torch.zeros(4, 3)) == usual_scale(torch.ones(4, 1)) == 1.0
    assert label_flag(logits) == [] and label_flag(logits.sort(1).values[:1].repeat(64, 1))


class RemembersLater(odd_models.Wrapped):
    """Answers truly while it is looked at first; then repeats what it said of images that look alike."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.asked, self.known = 0, cheating_models.Remembers(model)

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.known(x) if self.asked > LOOKED_AT else super().forward(x)


LOOKED_AT = 4_000


def test_a_model_that_learns_what_it_was_asked_is_seen_at_the_end(trained: Tiny, images: TensorImages) -> None:
    looks = RemembersLater(trained).eval()
    looked_at(looks, images)
    assert looks.asked < LOOKED_AT
    flags = evaluated(RemembersLater(trained).eval(), images, THREAT, steps=10, restarts=2).flags
    assert any(flag.startswith("After the attacks the model answers differently") for flag in flags), flags
