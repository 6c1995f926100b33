"""Pre-activation ResNet-18 for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Residual block of norm, ReLU and 3x3 convolution, twice (He et al., 2016, arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        y = self.conv1(activated)
        return self.conv2(F.relu(self.bn2(y))) + residual


class PreActResNet(nn.Module):
    """Residual network of four stages of pre-activation blocks with a 3x3 stem.

    The attributes (``conv1``, ``layer1`` to ``layer4``, ``bn``, ``linear``) are those of published checkpoints of the
    adversarial training literature.

    Args:
        widths: channels of each stage; every stage after the first halves the resolution.
        depths: blocks of each stage.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        inputs = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            blocks = []
            for index in range(depth):
                blocks.append(PreActBlock(inputs, width, 2 if stage > 1 and index == 0 else 1))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.stages = len(widths)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, in_chans, H, W]."""
        x = self.conv1(x)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


def preact_resnet18(num_classes: int = 10, in_chans: int = 3, width: float = 1) -> PreActResNet:
    """Return PreAct-ResNet-18 with 64-128-256-512 channels times `width`."""
    widths = tuple(max(1, round(base * width)) for base in (64, 128, 256, 512))
    return PreActResNet(widths, (2, 2, 2, 2), num_classes, in_chans)
