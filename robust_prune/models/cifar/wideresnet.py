"""Wide residual networks (Zagoruyko and Komodakis, 2016, arXiv 1605.07146)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError


class WideBlock(nn.Module):
    """Pre-activation block whose shortcut convolution gets the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.equalInOut = inputs == outputs
        self.convShortcut = None if self.equalInOut else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        activated = self.relu1(self.bn1(x))
        residual = x if self.convShortcut is None else self.convShortcut(activated)
        return residual + self.conv2(self.relu2(self.bn2(self.conv1(activated))))


class WideStage(nn.Module):
    """Stage of blocks of the same width, in the attribute ``layer``."""

    def __init__(self, depth: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                WideBlock(inputs if index == 0 else outputs, outputs, stride if index == 0 else 1)
                for index in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return self.layer(x)


class WideResNet(nn.Module):
    """WideResNet-`depth`-`widen_factor`.

    Module names and ``nChannels`` are those of TRADES and RobustBench, so that their state_dicts load unchanged.

    Args:
        depth: number of layers, 6n + 4.
        widen_factor: multiple of 16-32-64 channels.
        num_classes: number of logits.
        in_chans: channels of the images.
        sub_block1: whether the module holds the never-called ``sub_block1`` that TRADES' checkpoints carry.

    Raises:
        UsageError: `depth` is not 6n + 4.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: float,
        num_classes: int = 10,
        in_chans: int = 3,
        sub_block1: bool = False,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise UsageError(f"a WideResNet's depth must be 6n + 4 (10, 16, 22, 28, 34, 70), got {depth}")
        blocks = (depth - 4) // 6
        widths = [max(1, round(base * widen_factor)) for base in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, widths[0], stride=1)
        if sub_block1:
            self.sub_block1 = WideStage(blocks, 16, widths[0], stride=1)
        self.block2 = WideStage(blocks, widths[0], widths[1], stride=2)
        self.block3 = WideStage(blocks, widths[1], widths[2], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[2], num_classes)
        self.nChannels = widths[2]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, in_chans, H, W]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(-1, self.nChannels))
