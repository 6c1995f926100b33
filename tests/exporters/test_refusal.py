"""What the exporter refuses is said in one line with cause, place and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.branches import EarlyExit, Plain
from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.exporters.onnx import export_onnx


class Experts(nn.Module):
    """Kernels made for each image, in one grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(12, 12 * 12)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = self.route(x.mean((2, 3))).view(n * c, c, 1, 1)
        return nn.functional.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n).view(n, c, h, w)


class Mixed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.part = Experts()

    def between(self, x: Tensor) -> Tensor:
        return self.part(x)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (EarlyExit, (" at branches.py:", "decides by the value of a tensor", "torch.where")),
        (Mixed, (" at part (Experts), operation aten.conv2d.default", "depends on the number of images")),
    ],
)
def test_the_place_and_the_remedy_are_named(
    kind: type[nn.Module], said: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="exporter refuses the model") as refused:
        export_onnx(kind(), tmp_path / "model.onnx", torch.rand(9, 3, 8, 8), manifest={})
    assert all(part in str(refused.value) for part in said) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
