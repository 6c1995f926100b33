"""Small models, each with one structure that pruning must get right, and plans for them."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.structure.groups import GroupSearch


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


class Scales(nn.Module):
    """A Res2Net block: equal parts of one layer's output, each convolved after the result before it is added."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.expand = nn.Conv2d(10, 3 * width, 1)
        self.bn = nn.BatchNorm2d(3 * width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.join = nn.Conv2d(3 * width, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = torch.split(F.relu(self.bn(self.expand(x))), self.width, 1)
        first = F.relu(self.convs[0](parts[0]))
        second = F.relu(self.convs[1](first + parts[1]))
        return self.fc(F.relu(x + self.join(torch.cat([first, second, parts[2]], 1))).mean((2, 3)))


class SplitAttention(nn.Module):
    """A ResNeSt block: two maps a channel from a layer in two groups, weighed by a softmax over the two and summed."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 2 * channels, 3, padding=1, groups=2)
        self.fc1 = nn.Conv2d(channels, 6, 1)
        self.fc2 = nn.Conv2d(6, 2 * channels, 1)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.stem(x))))
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 2, channels // 2, height, width)
        gates = self.fc2(F.relu(self.fc1(x.sum(1).mean((2, 3), keepdim=True)))).view(batch, 2, -1).softmax(1)
        return self.fc((x * gates.reshape(batch, 2, -1, 1, 1)).sum(1).mean((2, 3)))


class TiedAttention(nn.Module):
    """Attention whose result is reshaped to the width of its input, with key and value in one layer."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        self.heads = heads
        self.head_dim = width // heads

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        q = self.q(self.norm(x)).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).reshape(batch, tokens, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        return self.head((x + self.proj(y)).mean(1))


class ChannelAttention(nn.Module):
    """A softmax over channels, so that no channel can go without a change of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mixed = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mixed(F.relu(self.stem(x))).mean((2, 3)).softmax(1))


class Caching(nn.Module):
    """Keeps what it computes from a weight in eval mode, as timm's LeViT and EfficientViT do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.bias = nn.Parameter(torch.zeros(4, 1))
        self.fc = nn.Linear(8, 5)
        self.kept: list[Tensor] = []

    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        if mode:
            self.kept = []
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.kept:
            self.kept = [self.bias * 2]
        bias = self.bias * 2 if self.training else self.kept[0]
        return self.fc(F.relu(self.stem(x).flatten(2).transpose(1, 2) + bias).mean(1))


class HandNorm(nn.Module):
    """A layer norm over channels written by hand, which knows its width, and a root mean square over them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = _OverChannels(width)
        self.conv = nn.Conv2d(width, 10, 3, padding=1)
        self.rms = _RootMeanSquare(10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.gelu(self.norm(self.stem(x)))))
        return self.fc(self.rms(x).mean((2, 3)))


class _OverChannels(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.shape, self.weight, self.bias).permute(0, 3, 1, 2)


class _RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.gain


class Standardised(nn.Module):
    """Convolutions that standardise their weights and have a gain for each output, with group norms without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = _Standardising(3, 12), _Standardising(12, 8)
        self.norm1, self.norm2 = nn.GroupNorm(2, 12), nn.GroupNorm(1, 8)
        self.norm1.bias = self.norm2.bias = None
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.conv(F.relu(self.norm1(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


class _Standardising(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))
        self.scores = nn.Parameter(torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scores
        weight = self.gain * (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Buffers(nn.Module):
    """Fixed tensors with an entry a channel: a mean and a deviation between layers, and a kernel that blurs."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 10, 3, padding=1)
        self.width = width
        self.register_buffer("mean", torch.linspace(-1, 1, width).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.linspace(1, 2, width).view(1, -1, 1, 1))
        self.register_buffer("blur", torch.linspace(0.1, 1, width * 9).view(width, 1, 3, 3))
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (F.relu(self.first(x)) - self.mean) / self.deviation
        x = F.conv2d(x, self.blur, padding=1, groups=self.width)
        return self.fc(F.relu(self.second(x)).mean((2, 3)))


class Segments(nn.Module):
    """Segments of one layer's channels, whose sizes are a list or two numbers, of which one is convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.sizes = [10, 4, 2]
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(16, 12, 1)
        self.changed, self.rest = 3, 9
        self.part = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(F.relu(self.stem(x)), self.sizes, dim=1)
        x = F.relu(self.second(torch.cat([a, self.middle(b), c], 1)))
        a, b = torch.split(x, [self.changed, self.rest], dim=1)
        return self.fc(torch.cat([self.part(a), b], 1).mean((2, 3)))


class Shuffle(nn.Module):
    """A channel shuffle between two convolutions in two groups."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, width, 1, groups=2), nn.Conv2d(width, 12, 1, groups=2)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(F.relu(self.second(self.bn(x))).mean((2, 3)))


class TorchAttention(nn.Module):
    """nn.MultiheadAttention on the path around it, an encoder layer of torch, and convolutions before them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.embed = nn.Conv2d(10, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(width, 4, 20, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(F.relu(self.stem(x))).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.layer(x).mean(1))


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
    "scales": Scales,
    "split_attention": SplitAttention,
    "tied_attention": TiedAttention,
    "caching": Caching,
    "hand_norm": HandNorm,
    "standardised": Standardised,
    "buffers": Buffers,
    "segments": Segments,
    "shuffle": Shuffle,
    "torch_attention": TorchAttention,
}


def example() -> Tensor:
    """One 8x8 image."""
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    """Five 8x8 images."""
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(9))


def plan_of(search: GroupSearch, ratio: float = 0.5) -> PruningPlan:
    """A plan that removes a random `ratio` of every group, equally from each of its blocks."""
    generator = random.Random(1)
    planned = []
    for group in search.groups:
        size = group.channels // group.blocks
        count = min(size - 1, max(1, round(size * ratio)))
        removed = [b * size + c for b in range(group.blocks) for c in generator.sample(range(size), count)]
        gone = tuple(sorted(removed))
        planned.append(PlannedGroup(group.name, group.channels, gone, 0.0, group.traced, group.members))
    return make_plan(*planned)


def make_plan(*groups: PlannedGroup) -> PruningPlan:
    """A plan of the given groups."""
    return PruningPlan(0.5, "channels", "uniform", "random", 1, groups, (), 0, 0, 0, 0)
