"""The quick attack before a compression: what it finds, and what it says of it."""

from __future__ import annotations

import pytest
import torch
from builders.training_sample import make_images
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel
from robust_prune.data.base import TensorImages, stratified
from robust_prune.errors import UsageError
from robust_prune.evaluation import dense_check
from robust_prune.evaluation.card import Accuracy
from robust_prune.evaluation.dense_check import DenseCheck, check_dense

THREAT = ThreatModel()


def checked(clean: tuple[int, int], robust: tuple[int, int], chance: float = 0.1, classes: int = 10) -> DenseCheck:
    return DenseCheck("held-out", Accuracy(*clean), Accuracy(*robust), chance, classes, THREAT)


def test_the_line_says_figures_and_conditions() -> None:
    line = checked((156, 200), (95, 200)).line()
    assert line == "Dense model on 200 held-out images: clean 78.0 %, robust 47.5 % (PGD-10, Linf 8/255)"
    assert "robust of 32 of them 50.0 %" in checked((40, 48), (16, 32)).line()


@pytest.mark.parametrize(
    ("clean", "robust", "chance", "said"),
    [
        ((156, 200), (95, 200), 0.1, ""),
        ((156, 200), (30, 200), 0.1, ""),
        ((180, 200), (0, 200), 0.1, "0.0 % under Linf 8/255: there is no robustness to keep.*Train it first"),
        ((180, 200), (4, 200), 0.1, "2.0 % under Linf 8/255: there is hardly any robustness to keep"),
        ((190, 200), (90, 200), 0.5, "45.0 % under Linf 8/255: there is hardly any"),
        ((26, 200), (0, 200), 0.1, "13.0 %, is chance for 10 classes: are weights, normalization and class order"),
        ((20, 200), (9, 200), 0.01, ""),
        ((20, 200), (0, 200), 0.01, "no robustness to keep"),
    ],
)
def test_hardly_any_robustness_and_chance_are_said(
    clean: tuple[int, int], robust: tuple[int, int], chance: float, said: str
) -> None:
    note = checked(clean, robust, chance).note()
    assert (note == "") == (said == "")
    if said:
        import re

        assert re.search(said, note) and "\n" not in note


def test_no_radius_is_no_reason_for_a_note() -> None:
    assert DenseCheck("held-out", Accuracy(90, 100), Accuracy(90, 100), 0.1, 10, ThreatModel("linf", 0.0)).note() == ""


class _Brightest(nn.Module):
    """Names the brightest channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((2, 3))


@pytest.fixture(scope="module")
def images() -> TensorImages:
    """Images of one class for each channel, which is brighter by 60 / 255."""
    labels = torch.arange(150) % 3
    x = torch.full((150, 3, 8, 8), 100, dtype=torch.uint8)
    x[torch.arange(150), labels] += 60
    return TensorImages(x, labels)


def test_robustness_is_lost_at_half_the_margin_and_the_model_is_as_before(images: TensorImages) -> None:
    model = _Brightest().train()
    for radius, robust in ((0.0, 150), (25 / 255, 150), (35 / 255, 0)):
        found = check_dense(model, images, images, 3, ThreatModel("linf", radius), 0, "cpu")
        assert (found.split, found.clean, found.robust) == ("held-out", Accuracy(150, 150), Accuracy(robust, 150))
        assert found.chance == pytest.approx(1 / 3) and bool(found.note()) == (robust == 0)
    assert model.training and model.scale.requires_grad


def test_training_images_are_used_where_none_are_held_out(images: TensorImages) -> None:
    found = check_dense(_Brightest(), stratified(images, 0), images, 3, THREAT, 0, "cpu")
    assert found.split == "training" and found.clean.total == 150


def test_a_slow_model_ends_the_check_after_seconds(images: TensorImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_check, "SECONDS", 0.0)
    monkeypatch.setattr(dense_check, "images_at_once", lambda *_: 4)
    found = check_dense(_Brightest(), images, images, 3, THREAT, 0, "cpu")
    assert (found.clean.total, found.robust.total) == (48, 4), "four survivors are enough"
    found = check_dense(_Brightest(), images, images, 3, ThreatModel("linf", 0.5), 0, "cpu")
    assert (found.clean.total, found.robust.total) == (48, 32)


class _Always(nn.Module):
    def __init__(self, label: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(10 * torch.eye(10)[label])

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + 0 * x.mean((1, 2, 3))[:, None]


def test_a_model_that_fails_or_other_labels_are_refused_in_one_line() -> None:
    images = make_images(20)

    class Broken(_Always):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("mat1 and mat2\nshapes")

    with pytest.raises(
        UsageError, match="cannot be run and attacked on images of the data: RuntimeError: mat1 and mat2 shapes"
    ):
        check_dense(Broken(0), images, images, 3, THREAT, 0, "cpu")
    with pytest.raises(UsageError, match="label 2 found, but the model has 2 outputs"):
        check_dense(_Always(0), images, images, 2, THREAT, 0, "cpu")
