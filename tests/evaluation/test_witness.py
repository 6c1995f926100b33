"""What attacks were told is measured afterwards."""

from __future__ import annotations

import sys

import pytest
import torch
from builders.evaluation_sample import THREAT, Tiny, evaluated
from builders.places import BENCHMARKS
from torch import Tensor, nn

from robust_prune.data.base import TensorImages
from robust_prune.evaluation.flags import boundary_flags, label_flag
from robust_prune.evaluation.witness import CAPACITY, Witness, witness_flags

sys.path.insert(0, str(BENCHMARKS))

import cheating_models
import odd_models

SAID = {
    "small values flipped": "along the signs of the gradient change the outputs by",
    "small values dropped": "whose gradient is zero change the outputs",
    "infinite values": "are not finite: it went astray",
}


class HeavyTailed(nn.Module):
    """A linear classifier whose gradient has few large and many small values, as those of networks on photographs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 3)
        drawn = torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
        self.head.weight.data = drawn.sign() * drawn.abs() ** 2.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


# The radius of `THREAT` is not the one that "memory outside the model" waits for; `benchmarks/alarms.py` has it.
@pytest.mark.parametrize("name", [name for name in cheating_models.DURING_ATTACK if "memory" not in name])
def test_cheats_that_show_themselves_to_attacks_alone_ring_an_alarm(
    trained: Tiny, images: TensorImages, name: str
) -> None:
    model = HeavyTailed() if "small values" in name else trained
    card = evaluated(cheating_models.CHEATS[name](model).eval(), images, THREAT, batch_size=75, precision="bf16")
    said = SAID.get(name, "The gradients that the attack saw are not those of the outputs")
    assert any(said in flag for flag in card.flags), card.flags


@pytest.mark.parametrize("name", ["as it is", "bf16 inside", "strides", "nearest neighbour", "a class ruled out"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_honest_models_ring_none(trained: Tiny, images: TensorImages, name: str, precision: str) -> None:
    card = evaluated(odd_models.HONEST[name](trained).eval(), images, THREAT, batch_size=75, precision=precision)
    assert card.flags == ()


def test_a_model_that_answers_an_attack_otherwise_is_flagged(trained: Tiny, images: TensorImages) -> None:
    class Mirrored(odd_models.Wrapped):
        """Mirrors those images of an attack that are not of 8 bits."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.where(cheating_models.on_grid(x), x, x.flip(-1)) if x.requires_grad else x)

    card = evaluated(Mirrored(trained).eval(), images, THREAT, batch_size=75)
    assert any("answered it otherwise than it answers without a gradient" in flag for flag in card.flags), card.flags


def test_a_sample_of_all_gradients_is_kept_whatever_the_objective() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    witness = Witness(model, 0)
    seen: list[Tensor] = []
    for step in range(200):
        x = torch.full((5, 3, 2, 2), step / 200).requires_grad_(True)
        seen.append(torch.autograd.grad((witness(x).square() * (step + 1)).sum(), x)[0])
        with torch.no_grad():
            witness(x)
    noted = witness.noted()
    assert noted is not None and len(noted.points) == CAPACITY
    steps = (noted.points[:, 0, 0, 0] * 200).round().long()
    assert len(steps.unique()) > 20 and steps.min() < 60 and steps.max() > 140
    for step, gradient in zip(steps.tolist(), noted.gradients, strict=True):
        assert torch.equal(gradient, seen[step][0])
    assert witness_flags(model, noted, torch.device("cpu"), "linf") == []
    assert Witness(model, 0).noted() is None


def test_outputs_that_jump_where_the_class_changes_are_flagged(trained: Tiny, images: TensorImages) -> None:
    x = images.images[:64].float() / 255
    for name, rings in (("lure", True), ("hard label and a whisper", True), ("tiny logits", False)):
        model = cheating_models.CHEATS[name](trained).eval()
        with torch.no_grad():
            flags = boundary_flags(model, x, model(x))
        assert bool(flags) is rings, (name, flags)


def test_a_class_that_is_ruled_out_hides_no_label_and_constant_outputs_are_named(
    trained: Tiny, images: TensorImages
) -> None:
    with torch.no_grad():
        logits = trained(images.images[:64].float() / 255)
    assert label_flag(torch.cat([logits, torch.full_like(logits[:, :1], -1e6)], 1)) == []
    assert label_flag(logits[:1].expand(32, -1)) == ["The outputs do not depend on the image."]
