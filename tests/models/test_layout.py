"""Precisions and memory formats are used only where the model runs in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.branches import Plain
from torch import Tensor, nn

from robust_prune.models import layout
from robust_prune.models.layout import fastest_passes, runs_in_bf16
from robust_prune.training import decisions, precision
from robust_prune.training.precision import choose_precision


class NoBf16(Plain):
    """Holds an operation that is not written for bf16."""

    def between(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            raise RuntimeError("\"deformable_im2col\" not implemented for 'BFloat16'")
        return x


class ViewInTraining(Plain):
    def between(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).view(x.shape) if self.training else x


def test_bf16_is_left_out_where_the_model_fails_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "has_fast_bf16", lambda device: True)
    images = torch.rand(2, 3, 8, 8)
    assert runs_in_bf16(Plain().eval(), images) and not runs_in_bf16(NoBf16().eval(), images)
    monkeypatch.setattr(layout, "has_fast_bf16", lambda device: False)
    assert not runs_in_bf16(Plain().eval(), images)


def test_a_format_in_which_only_training_fails_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: False)
    model = ViewInTraining()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not choose_precision(model, torch.rand(4, 3, 8, 8), repeats=1).channels_last
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and model.training


def test_the_same_machine_chooses_the_same_precision_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Plain(), torch.rand(4, 3, 8, 8)
    for first in (True, False):
        timed = iter([{"bf16": False, "channels_last": first}])
        monkeypatch.setattr(precision, "_fastest", lambda *_, timed=timed: next(timed))
        assert [choose_precision(model, images).channels_last for _ in range(2)] == [True, True]
    monkeypatch.setattr(precision, "_fastest", lambda *_: {"bf16": False, "channels_last": False})
    assert not choose_precision(model, images[:2]).channels_last
    (decisions.cache_folder() / "decisions.json").write_text("{")
    assert not choose_precision(model, images).channels_last


def _flattened(x: Tensor) -> Tensor:
    return x.view(len(x) * x.shape[1], 1, *x.shape[2:]).view(x.shape)


def _asserted(x: Tensor) -> Tensor:
    assert x.is_contiguous()
    return x


def _single(x: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        raise TypeError("no bf16 here")
    return x


@pytest.mark.parametrize(
    ("between", "layout_found", "bf16"),
    [
        (lambda x: x, torch.channels_last, True),
        (_flattened, torch.contiguous_format, True),  # with one image it would run in channels_last
        (_asserted, torch.contiguous_format, True),
        (_single, torch.channels_last, False),
    ],
)
def test_the_fastest_passes_are_those_that_run(
    between: Any, layout_found: torch.memory_format, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return between(self.conv(x)).mean((2, 3))

    monkeypatch.setattr(layout, "has_fast_bf16", lambda device: True)
    assert fastest_passes(Between().eval(), torch.rand(2, 3, 8, 8)) == (layout_found, bf16)
    assert fastest_passes(Between().eval().double(), torch.rand(2, 3, 8, 8).double()) == (layout_found, False)


@pytest.mark.parametrize(
    ("shortcut", "layout_found"),
    [
        (nn.Conv2d(4, 4, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(8, 4, 1, stride=2, groups=2), torch.contiguous_format),
        (nn.Conv2d(8, 4, 1, stride=2), torch.channels_last),
        (nn.Conv2d(4, 4, 1), torch.channels_last),
        (nn.Conv2d(4, 4, 3, stride=2), torch.channels_last),
    ],
)
def test_narrow_strided_shortcuts_are_not_run_in_channels_last(
    shortcut: nn.Module, layout_found: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN corrupts the heap in their weight gradient, on CPUs without AVX-512."""
    monkeypatch.setattr(layout, "has_fast_bf16", lambda device: False)
    model = nn.Sequential(nn.Conv2d(3, shortcut.in_channels, 3), shortcut, nn.Flatten(), nn.LazyLinear(5)).eval()
    images = torch.rand(2, 3, 8, 8)
    model(images)
    assert fastest_passes(model, images) == (layout_found, False)
    assert layout.fastest_layout(model, images) == layout_found
    timed = precision._fastest(model, images, 1)
    assert not timed["channels_last"] or layout_found == torch.channels_last
