"""Every cheating model is flagged, and no honest one."""

from __future__ import annotations

import pytest
import torch
from builders.evaluation_sample import (
    THREAT,
    Mirrored,
    Tiny,
    evaluated,
)
from torch import Tensor, nn

from robust_prune.attacks.objectives import classify
from robust_prune.catalogue import TIERS
from robust_prune.data.base import TensorImages
from robust_prune.errors import UsageError
from robust_prune.evaluation.flags import BUFFERS_MOVED, exported_flags

# --- flags -------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Probabilities(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).softmax(1)


class Saturated(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.model(x)


class MovesBuffers(Wrapped):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.model(x)


class UsesTheBatch(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits - logits.mean(0, keepdim=True)


class Noisy(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


class NotFinite(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.where(x.mean((1, 2, 3)).unsqueeze(1) > 0.45, logits * float("inf"), logits)


class WantsBytes(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x / 255)


class WantsNormalised(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(
            x * x.new_tensor([[[0.229]], [[0.224]], [[0.225]]]) + x.new_tensor([[[0.485]], [[0.456]], [[0.406]]])
        )


class BackToTraining(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        self.model.train()
        return self.model(x)


@pytest.mark.parametrize(
    ("cheat", "sentence"),
    [
        (Probabilities, "All outputs are in [0, 1], like probabilities"),
        (Saturated, "a scale that hides the cross-entropy's gradient: attacks saw the logits times"),
        (MovesBuffers, "Buffers of the model moved"),
        (UsesTheBatch, "depend on the batch"),
        (Noisy, "Two passes over the same images differ"),
        (NotFinite, "not finite; they count as wrong"),
        (WantsBytes, "points better (limit 10, 64 images) on images in [0, 255]"),
        (WantsNormalised, "points better (limit 10, 64 images) on images normalized by imagenet"),
        (BackToTraining, "back into training mode"),
    ],
)
def test_cheating_models_are_flagged(trained: Tiny, images: TensorImages, cheat: type[Wrapped], sentence: str) -> None:
    model = cheat(trained).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    card = evaluated(model, images, THREAT, steps=2, restarts=1)
    assert any(sentence in flag for flag in card.flags), card.flags
    assert card.robust.correct <= card.clean.correct
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.training and not trained.training


def test_training_mode_is_flagged_and_comes_back(trained: Tiny, images: TensorImages) -> None:
    reference = evaluated(trained, images, THREAT, steps=2)
    trained.train()
    trained.head.eval()
    try:
        card = evaluated(trained, images, THREAT, steps=2)
        assert trained.training and trained.features[1].training and not trained.head.training
    finally:
        trained.eval()
    assert any("not in eval mode" in flag for flag in card.flags)
    assert card.robust == reference.robust


class MovesBuffersLater(MovesBuffers):
    """Keeps still while it is looked at first."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) if self.calls > 30 else self.model(x)


def test_buffers_that_move_only_later_are_flagged_too(trained: Tiny, images: TensorImages) -> None:
    model = MovesBuffersLater(trained).eval()
    flags = evaluated(model, images, THREAT, steps=20, batch_size=32).flags
    assert model.calls > 60 and flags == (BUFFERS_MOVED,)


def test_what_stronger_attacks_find_beyond_pgd_is_flagged(trained: Tiny, images: TensorImages) -> None:
    twice = TensorImages(torch.cat([images.images] * 2), torch.cat([images.labels] * 2))  # the alarm needs 300
    card = evaluated(trained, twice, THREAT, tier="apgd", steps=1, restarts=1)
    gap = 100 * (card.breakdown["pgd"] - card.robust.correct) / 300
    assert gap > 8, "one step of PGD is meant to be weak"
    assert any(f"Stronger attacks found {gap:.1f} points that PGD missed" in flag for flag in card.flags)


def test_a_file_that_is_more_robust_than_its_model_is_flagged(trained: Tiny, images: TensorImages) -> None:
    card = evaluated(trained, images, THREAT, steps=10, restarts=1, exported={"int8": Mirrored(trained)})
    gap = 100 * (card.exported["int8"].robust.correct - card.robust.correct) / 150
    assert gap > 1
    assert any(f"The int8 file's robust accuracy is {gap:.1f} points above the torch model's" in f for f in card.flags)


def test_exported_flags_have_their_limits() -> None:
    assert exported_flags("fp32", 5, 1000, 500, 510) == []
    assert "0.6 %" in exported_flags("fp32", 6, 1000, 500, 500)[0]
    assert "1.1 points above" in exported_flags("fp32", 0, 1000, 500, 511)[0]
    assert "1.1 points below" in exported_flags("fp32", 0, 1000, 511, 500)[0]
    assert exported_flags("int8", 0, 1000, 511, 450, same=False) == [], "another function may be weaker"


def test_non_finite_logits_never_count_as_right() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [0.0, float("inf")]])
    assert classify(logits).tolist() == [1, -1, -1]


# --- requests that cannot be met ---------------------------------------------------------------------------------


def test_unknown_tier_lists_those_that_exist(trained: Tiny, images: TensorImages) -> None:
    with pytest.raises(UsageError, match=r"evaluation.tier must be one of .*, got 'strongest'") as caught:
        evaluated(trained, images, THREAT, tier="strongest")
    assert all(name in str(caught.value) for name in TIERS.names)


def test_bad_requests_say_what_is_wrong(trained: Tiny, images: TensorImages) -> None:
    empty = TensorImages(images.images[:0], images.labels[:0])
    with pytest.raises(UsageError, match="no images"):
        evaluated(trained, empty, THREAT)
    with pytest.raises(UsageError, match=r"evaluation.steps: input should be greater than or equal to 1, got 0"):
        evaluated(trained, images, THREAT, steps=0)
    with pytest.raises(UsageError, match="has 3 outputs"):
        evaluated(trained, TensorImages(images.images, images.labels + 5), THREAT)
    with pytest.raises(UsageError, match="float32 weights"):
        evaluated(Tiny().half(), images, THREAT)

    class Rounded(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.model(x)

    with pytest.raises(UsageError, match="no gradient"):
        evaluated(Rounded(trained).eval(), images, THREAT)
