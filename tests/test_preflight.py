"""What a model does on training images decides, in one line and before any work, whether it is taken."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from builders.branches import DarkAndLight, Plain, SideHead
from builders.training_sample import make_images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robust_prune.errors import UsageError
from robust_prune.preflight import preflight

IMAGES = make_images(40)


class TupleInTraining(Plain):
    def after(self, logits: Tensor):
        return (logits, logits) if self.training else logits


class DictInTraining(Plain):
    def after(self, logits: Tensor):
        return {"out": logits, "aux": logits} if self.training else logits


class LossInTraining(Plain):
    def after(self, logits: Tensor) -> Tensor:
        return logits.square().mean() if self.training else logits


class Indices(Plain):
    def after(self, logits: Tensor) -> Tensor:
        return logits.argsort(1)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("not in training")
        return x


class BrokenInTraining(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.part = Broken()

    def between(self, x: Tensor) -> Tensor:
        return self.part(x)


class WantsLabels(Plain):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x)


class OneImage(Plain):
    def between(self, x: Tensor) -> Tensor:
        return x.view(1, 12, 8, 8)


class NotOneImage(Plain):
    def after(self, logits: Tensor) -> Tensor:
        return logits.squeeze()


class AlwaysDropout(Plain):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x)


class SkipsAtRandom(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.skipped = nn.Conv2d(12, 12, 1)

    def between(self, x: Tensor) -> Tensor:
        return self.skipped(x) if random.random() < 0.5 else x


class Mixes(Plain):
    def between(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.flip(0)


class BatchStatistics(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.BatchNorm2d(16, track_running_stats=False)


class Remembers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(12))

    def between(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean((0, 2, 3))
        return x


class Awake(Plain):
    def between(self, x: Tensor) -> Tensor:
        self.body.train()
        return x


class Blind(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Rounds(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 4).round())


class Overflows(Plain):
    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.body[0].weight, float("nan"))


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Untrainable(Plain):
    def between(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape) if self.training else x

    def after(self, logits: Tensor) -> Tensor:
        return logits.detach() if self.training else logits


class NoWayBack(Plain):
    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no derivative")

    def between(self, x: Tensor) -> Tensor:
        return self.Step.apply(x)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (TupleInTraining, "in train mode the model returns a tuple of 2 values, and must return one tensor of logits"),
        (DictInTraining, "a dict of out, aux"),
        (LossInTraining, "a tensor [] of float32"),
        (Indices, "in eval mode the model returns a tensor [16, 3] of int64"),
        (BrokenInTraining, "fails in train mode, at part (Broken): RuntimeError: not in training."),
        (WantsLabels, "forward must take the images alone"),
        (OneImage, "fails in eval mode, at the model"),
        (NotOneImage, "in eval mode on a single image the model returns a tensor [3]"),
        (AlwaysDropout, "the model is random"),
        (SkipsAtRandom, "two passes over the same images in eval mode differ"),
        (Mixes, "depend on the batch it is in"),
        (BatchStatistics, "first in body.1 (BatchNorm2d)"),
        (Remembers, "buffer seen changes in eval mode"),
        (Awake, "the model puts body into train mode"),
        (Blind, "no gradient with respect to the images"),
        (Rounds, "zero everywhere"),
        (Overflows, "body.0 (Conv2d) makes them so from finite values"),
        (Frozen, "Call model.requires_grad_(True)"),
        (Untrainable, "the loss has no gradient in any parameter"),
        (NoWayBack, "fails backward in eval mode: RuntimeError: no derivative"),
    ],
)
def test_what_cannot_work_later_is_refused_with_module_and_remedy(kind: type[nn.Module], said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UsageError) as refused:
        preflight(kind(), IMAGES, 3, 0)
    assert said.replace(", at the model", "") in str(refused.value) and "\n" not in str(refused.value)


class Training(Plain):
    """Random, and with changing buffers, but only while it trains; keeps its features; is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()
        self.register_buffer("seen", torch.zeros(()))
        self.features = None

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        self.features = checkpoint(self.drop, x, use_reentrant=False)
        return self.features


def test_what_works_passes_without_a_word_and_nothing_of_it_moves() -> None:
    model = Training().train()
    model.head.eval()
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    python = random.getstate()
    assert preflight(model, IMAGES, 3, 0).notes == ()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and not model.head.training and model.features is None
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


def test_layers_that_are_not_always_run_are_named() -> None:
    model = SideHead()
    model.spare = nn.Linear(2, 2)
    side, spare = preflight(model, IMAGES, 3, 0).notes
    assert side.startswith("Only training runs side;") and spare.startswith("No image runs spare;")
    (some,) = preflight(DarkAndLight(), IMAGES, 3, 0).notes
    assert some.startswith("Only some images take dark, light;")


def test_masked_layers_may_be_trained_but_not_cut() -> None:
    model = Plain()
    torch.nn.utils.parametrizations.weight_norm(model.body[0])
    preflight(model, IMAGES, 3, 0, cut=False)
    with pytest.raises(UsageError, match=r"layer body\.0 .* re-parametrises its weight"):
        preflight(model, IMAGES, 3, 0)


def test_a_batch_size_that_batch_norm_cannot_train_on_is_refused() -> None:
    model = Plain()
    model.head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    preflight(model, IMAGES, 3, 0, batch_size=2)
    with pytest.raises(UsageError, match=r"in train mode on one image, at head\.1 \(BatchNorm1d\).* Raise batch_size"):
        preflight(model, IMAGES, 3, 0, batch_size=1)
