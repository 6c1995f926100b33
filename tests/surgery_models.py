"""Small models, each with one structure that pruning must get right, and plans for them."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.pruning.groups import GroupSearch
from robust_prune.pruning.types import PlannedGroup, PruningPlan


class Residual(nn.Module):
    """A stem, a block with an identity shortcut, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(12)
        self.conv1 = nn.Conv2d(12, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(x + y).mean((2, 3)))


class Grouped(nn.Module):
    """A depthwise and a grouped convolution, PReLU and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 16, 1)
        self.act = nn.PReLU(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(2, 24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(F.relu(self.depthwise(self.a(x)))))
        return self.fc(F.relu(self.norm(self.grouped(x))).mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side under one batch norm, with a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 10, 1)
        self.bn = nn.BatchNorm2d(16)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(torch.cat([self.left(x), self.right(x)], 1)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc((x * gate).mean((2, 3)))


class Flatten(nn.Module):
    """VGG's way: a 2x2 map flattened into a linear layer, and a second one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4))
        self.classifier = nn.Sequential(nn.Linear(32, 14), nn.ReLU(), nn.Linear(14, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Gate(nn.Module):
    """The two halves of one layer meet: channel c and channel c + 6 can only go together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return self.fc((value * torch.sigmoid(gate)).mean((2, 3)))


class Mlp(nn.Module):
    """A patch embedding, a layer norm and an MLP whose hidden width is `width`."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(F.gelu(self.fc1(x)).mean(1))


class ResponseNorm(nn.Module):
    """Global response norm as in ConvNeXt-V2: every channel over the mean of all, so that a cut changes the others."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = _Response(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(F.gelu(self.stem(x)).permute(0, 2, 3, 1)).mean((1, 2)))


class _Response(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps, self.rate = 1e-2, 0.1

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.weight * x * size / (size.mean(-1, keepdim=True) + self.eps) + self.bias


class StaleWideResNet(nn.Module):
    """A pre-activation net in RobustBench's style: the last view uses a number remembered by the model."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)
        self.nChannels = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.relu(self.bn2(x + self.conv2(F.relu(self.bn1(x)))))
        return self.fc(F.avg_pool2d(x, 8).view(-1, self.nChannels))


class Unprunable(nn.Module):
    """A prunable stem before a block that writes a channel count by hand and one that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.fixed = nn.Conv2d(16, 8, 3, padding=1)
        self.mix = nn.Conv2d(4, 6, 1)
        self.sorted = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fixed(F.relu(self.stem(x)))
        x = F.relu(self.mix(x.view(-1, 2, 4, 8, 8).sum(1)))
        return self.fc(self.sorted(x).mean((2, 3)).sort(1).values)


class Reused(nn.Module):
    """One convolution runs twice, so that its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.after = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.fc(F.relu(self.after(x)).mean((2, 3)))


class SeparateAttention(nn.Module):
    """Attention with separate layers, a softmax written out and its temperature in an attribute."""

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.q, self.k, self.v = (nn.Linear(16, width) for _ in range(3))
        self.proj = nn.Linear(width, 16)
        self.head = nn.Linear(16, 5)
        self.heads = heads
        self.dim_head = width // heads
        self.scale = (width // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = (
            f(x).reshape(x.shape[0], x.shape[1], self.heads, self.dim_head).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))).mean(1))


class HeadMajorAttention(nn.Module):
    """Fused attention whose layer keeps each head's query, key and value together; heads and their width coincide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)
        self.heads = self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(x).reshape(x.shape[0], -1, self.heads, 3 * self.width).transpose(1, 2)
        y = F.scaled_dot_product_attention(*qkv.split(self.width, dim=-1))
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))).mean(1))


def vit() -> nn.Module:
    """timm's vision transformer, two blocks of two heads."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5)


MODELS = {
    "residual": Residual,
    "grouped": Grouped,
    "concat": Concat,
    "flatten": Flatten,
    "gate": Gate,
    "mlp": Mlp,
    "wide_resnet": StaleWideResNet,
    "attention": SeparateAttention,
    "head_major": HeadMajorAttention,
    "vit": vit,
}


def randomised(model: nn.Module) -> nn.Module:
    """`model` in eval mode with weights and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(noise + 0.5 if parameter.dim() == 1 else (noise - 0.5) * 0.6)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def example() -> Tensor:
    """One 8x8 image."""
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plan_of(search: GroupSearch, ratio: float = 0.5) -> PruningPlan:
    """A plan that removes a random `ratio` of every group, equally from each of its blocks."""
    generator = random.Random(1)
    planned = []
    for group in search.groups:
        size = group.channels // group.blocks
        count = min(size - 1, max(1, round(size * ratio)))
        removed = [b * size + c for b in range(group.blocks) for c in generator.sample(range(size), count)]
        planned.append(PlannedGroup(group.name, group.channels, tuple(sorted(removed)), 0.0))
    return make_plan(*planned)


def make_plan(*groups: PlannedGroup) -> PruningPlan:
    """A plan of the given groups."""
    return PruningPlan(0.5, "channels", "uniform", "random", 1, groups, (), 0, 0, 0, 0)
