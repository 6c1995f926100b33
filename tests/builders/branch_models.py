"""Small models with residual branches of many forms."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block whose sum is made in place, as in torchvision, with a stride that the shortcut follows."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, 10, 3, stride, 1, bias=False), nn.BatchNorm2d(10)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(10, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Residuals(nn.Module):
    """Three blocks, one after the other."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 12, 2), Block(12, 12, 1))
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Scaled(nn.Module):
    """A branch whose width, as the code remembers it, appears in the forward pass of its block."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.conv1, self.conv2 = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, self.width, 32, 32) + self.conv2(F.relu(self.conv1(x)))


class Remembered(nn.Module):
    """A stem, a `Scaled` block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3, padding=1), Scaled(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Padded(nn.Module):
    """A 3x3 convolution behind the layer that reads the channels: its result differs at the borders."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Multiplied(nn.Module):
    """A gate: its result is multiplied, not added."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x)


class Dropping(nn.Module):
    """Its code decides by the mode, outside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x + self.body(x), 0.5, training=self.training)


class Made(nn.Module):
    """Its code makes a tensor, which tracing would keep as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(0.5) * x + self.body(x)


class Normed(nn.Module):
    """A branch with group norms inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.block = nn.Sequential(Group(), Group())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Group(nn.Module):
    """A block with group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.g1 = nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.c2, self.g2 = nn.Conv2d(12, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c2(F.relu(self.g1(self.c1(x))))


class OnlyInTraining(Residuals):
    """What it computes in train mode depends on the width of its stem."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            x = x * (x.shape[1] / 8)
        return self.fc(self.blocks(x).mean((2, 3)))


class Around(nn.Module):
    """A stem, a block and a head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3, padding=1), block, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(F.relu(self.stem(x))).mean((2, 3)))


def mobilenet() -> nn.Module:
    """A MobileNetV3: expansions with depthwise layers and squeeze and excitation."""
    return timm.create_model("mobilenetv3_small_050", num_classes=5)


def transformer() -> nn.Module:
    """A vision transformer of two blocks."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=2, num_classes=5
    )


def convnext() -> nn.Module:
    """A ConvNeXt, with layer norms over channels and layer scale."""
    return timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), patch_size=2)


MODELS = {
    "in place": (Residuals, ("blocks.0.conv1", "blocks.1.conv1")),
    "attribute": (Remembered, ("block.conv1",)),
    "mobilenet": (mobilenet, ("blocks.2.1.conv_pw",)),
    "transformer": (transformer, ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1")),
    "convnext": (convnext, ("stages.1.blocks.0.mlp.fc1",)),
}
"""A model of each kind, and groups whose channels are those of a branch."""


def images(size: int = 32) -> Tensor:
    """Four random images."""
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(5))
