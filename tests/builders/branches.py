"""Classifiers of [N, 3, 8, 8] images with parts that one pass in eval mode over noise does not show."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Two convolutions and a head; the others change one thing of it."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, classes)

    def between(self, x: Tensor) -> Tensor:
        return x

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.body(self.between(self.stem(x))).mean((2, 3))))


class SideHead(Plain):
    """A side head that only training runs, added to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Conv2d(12, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits = self.head(self.body(x).mean((2, 3)))
        return logits + 0.3 * self.side(x) if self.training else logits


class NoisyTraining(Plain):
    """A parameter that only training uses, with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.full((1, 12, 1, 1), 0.1))

    def between(self, x: Tensor) -> Tensor:
        return x + self.level * torch.randn_like(x) if self.training else x


class TwoNorms(Plain):
    """One batch norm for training, another for testing."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(12, affine=False) for _ in range(2)])

    def between(self, x: Tensor) -> Tensor:
        return self.norms[int(self.training)](x)


class FixedOrder(Plain):
    """Training shuffles channels by numbers that are written down."""

    def between(self, x: Tensor) -> Tensor:
        return x[:, list(range(11, -1, -1))] if self.training else x


class DarkAndLight(Plain):
    """Dark images take another branch than light ones; uniform noise is never dark."""

    def __init__(self) -> None:
        super().__init__()
        self.dark = nn.Conv2d(12, 12, 1)
        self.light = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [
            (self.dark if bool(image.mean() < 0.3) else self.light)(features[None])
            for image, features in zip(x, self.stem(x), strict=True)
        ]
        return self.head(self.body(torch.cat(found)).mean((2, 3)))


class EarlyExit(Plain):
    """Leaves after the stem where the first head is sure, which it never is with its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(12, 3)
        nn.init.zeros_(self.early.weight)
        nn.init.zeros_(self.early.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        early = self.early(x.mean((2, 3)))
        if bool(early.softmax(1).amax() > 0.4):
            return early
        return self.head(self.body(x).mean((2, 3)))


class WeightSwitch(Plain):
    """Weights of its own switch on a lookup by numbers that are written down; others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = nn.Parameter(torch.full((2,), 9.0))

    def between(self, x: Tensor) -> Tensor:
        return x[:, list(range(11, -1, -1))] if bool(self.switch.sum() > 5) else x


def pictures(count: int = 16) -> Tensor:
    """Dark and light images by turns, float [N, 3, 8, 8] in [0, 1]."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.4
    images[1::2] += 0.6
    return images
