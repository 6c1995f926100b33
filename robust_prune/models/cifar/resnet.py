"""ResNets for small images: the ImageNet family with a 3x3 stem, and the three-stage family of He et al. (2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al., 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network of basic blocks with a 3x3 stem and global average pooling.

    Args:
        widths: channels of each stage; every stage after the first halves the resolution.
        depths: blocks of each stage.
        num_classes: number of logits.
        in_chans: channels of the images.
    """

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_chans, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            blocks = []
            for index in range(depth):
                blocks.append(BasicBlock(inputs, width, 2 if stage > 1 and index == 0 else 1))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.stages = len(widths)
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, in_chans, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


def resnet18(num_classes: int = 10, in_chans: int = 3, width: float = 1) -> CifarResNet:
    """Return ResNet-18 with a 3x3 stem and 64-128-256-512 channels times `width`."""
    return CifarResNet(_scaled((64, 128, 256, 512), width), (2, 2, 2, 2), num_classes, in_chans)


def resnet34(num_classes: int = 10, in_chans: int = 3, width: float = 1) -> CifarResNet:
    """Return ResNet-34 with a 3x3 stem and 64-128-256-512 channels times `width`."""
    return CifarResNet(_scaled((64, 128, 256, 512), width), (3, 4, 6, 3), num_classes, in_chans)


def resnet20(num_classes: int = 10, in_chans: int = 3, width: float = 1) -> CifarResNet:
    """Return the 20-layer CIFAR ResNet with 16-32-64 channels times `width`."""
    return CifarResNet(_scaled((16, 32, 64), width), (3, 3, 3), num_classes, in_chans)


def resnet32(num_classes: int = 10, in_chans: int = 3, width: float = 1) -> CifarResNet:
    """Return the 32-layer CIFAR ResNet with 16-32-64 channels times `width`."""
    return CifarResNet(_scaled((16, 32, 64), width), (5, 5, 5), num_classes, in_chans)


def _scaled(widths: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(max(1, round(width * factor)) for width in widths)
