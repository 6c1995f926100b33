"""A small network with lived-in statistics, and smooth images, for exports."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Conv, batch-norm with lived-in statistics, residual, dropout, linear; [N, 3, 16, 16] to 5 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.45))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x - self.mean)))
        x = torch.relu(x + self.body(x))
        return self.head(self.drop(x.mean((2, 3))))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    model = Small()
    for parameter in (model.norm.weight, model.norm.bias, model.norm.running_mean):
        nn.init.normal_(parameter, 0.3, 0.5)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    return model.eval()


def images(count: int = 12, size: int = 16) -> Tensor:
    """Smooth random images: neighbouring pixels correlate, as in photographs."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear").clamp(0, 1)
