"""Closed-form MACs and parameters against models really built at the smaller widths."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from robust_prune.budget.cost import cost_model, count_macs, count_params
from robust_prune.errors import UsageError
from robust_prune.structure.types import ChannelGroup, GroupSlice


def part(target, side, channels, start=0, repeat=1, dim=0):
    """Channel c owns positions start + c*repeat .. start + (c+1)*repeat - 1."""
    index = tuple(range(start, start + channels * repeat))
    return GroupSlice(target, side, index, tuple(i // repeat for i in range(channels * repeat)), dim)


class Residual(nn.Module):
    """A stem and one residual block: the stream is one coupled group, the block's inside another."""

    def __init__(self, stream=8, inside=12):
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(stream)
        self.conv1 = nn.Conv2d(stream, inside, 3, padding=1)
        self.conv2 = nn.Conv2d(inside, stream, 3, padding=1)
        self.fc = nn.Linear(stream, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.conv2(self.conv1(x).relu())
        return self.fc(x.mean((2, 3)))

    @staticmethod
    def groups(stream=8, inside=12):
        return [
            ChannelGroup(
                "stem",
                stream,
                (
                    part("stem", "out", stream),
                    part("norm", "norm", stream),
                    part("conv1", "in", stream),
                    part("conv2", "out", stream),
                    part("fc", "in", stream),
                ),
            ),
            ChannelGroup("conv1", inside, (part("conv1", "out", inside), part("conv2", "in", inside))),
        ]


class Mixed(nn.Module):
    """Concatenation, depthwise and grouped convolutions, flatten, transposed convolution and a free scale."""

    def __init__(self, left=8, right=4, mid=16):
        super().__init__()
        both = left + right
        self.left = nn.Conv2d(3, left, 3, padding=1)
        self.right = nn.ConvTranspose2d(3, right, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(1, both, 1, 1))
        self.depth = nn.Conv2d(both, both, 3, padding=1, groups=both)
        self.mix = nn.Conv2d(both, mid, 1)
        self.act = nn.PReLU(mid)
        self.grouped = nn.Conv2d(mid, mid, 3, stride=2, padding=1, groups=4)
        self.fc = nn.Linear(mid * 16, 10)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], 1) * self.scale
        x = self.act(self.mix(self.depth(x)))
        return self.fc(self.grouped(x).flatten(1))

    @staticmethod
    def groups(left=8, right=4, mid=16):
        def branch(name, channels, start):
            return ChannelGroup(
                name,
                channels,
                (
                    part(name, "out", channels),
                    part("scale", "param", channels, start, dim=1),
                    part("depth", "out", channels, start),
                    part("depth", "in", channels, start),
                    part("mix", "in", channels, start),
                ),
            )

        coupled = (
            part("mix", "out", mid),
            part("act", "norm", mid),
            part("grouped", "in", mid),
            part("grouped", "out", mid),
            part("fc", "in", mid, repeat=16),
        )
        return [branch("left", left, 0), branch("right", right, left), ChannelGroup("mix", mid, coupled, blocks=4)]


class Attention(nn.Module):
    """Fused qkv: the group is the heads' width, once in each of q, k and v."""

    def __init__(self, width=16, inner=16, fused=True):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = nn.Linear(inner, width)
        self.fused = fused

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.proj(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)

    @staticmethod
    def groups(inner=16):
        qkv = GroupSlice("qkv", "out", tuple(range(3 * inner)), tuple(range(inner)) * 3)
        return [ChannelGroup("qkv", inner, (qkv, part("proj", "in", inner)))]


X = torch.zeros(2, 3, 8, 8)
WIDTHS = {
    "residual": (Residual, [{}, {"stem": 3}, {"conv1": 5}, {"stem": 1, "conv1": 1}], ("stem", "conv1")),
    "mixed": (
        Mixed,
        [{}, {"left": 3}, {"right": 1}, {"mix": 4}, {"left": 5, "right": 2, "mix": 8}],
        ("left", "right", "mix"),
    ),
}


@pytest.mark.parametrize("kind", WIDTHS)
def test_closed_form_equals_models_built_at_those_widths(kind):
    build, plans, names = WIDTHS[kind]
    groups = build.groups()
    cost = cost_model(build(), X, groups)
    dense = {g.name: g.channels for g in groups}
    for keep in plans:
        real = build(*[(dense | keep)[name] for name in names])
        assert cost.macs(keep) == count_macs(real, X)
        assert cost.params(keep) == count_params(real)
        assert cost.channels(keep) == sum((dense | keep).values())


@pytest.mark.parametrize("fused", [True, False])
def test_attention_products_follow_the_width_of_the_heads(fused):
    cost = cost_model(Attention(fused=fused), X, Attention.groups())
    for inner in (16, 10, 2):
        real = Attention(inner=inner, fused=fused)
        assert cost.macs({"qkv": inner}) == count_macs(real, X)
        assert cost.params({"qkv": inner}) == count_params(real)
    tokens, width, inner = 16, 16, 10
    by_hand = tokens * 12 * width + tokens * width * 3 * inner + 2 * tokens * tokens * inner + tokens * inner * width
    assert cost.macs({"qkv": 10}) == by_hand


def test_count_by_hand():
    model = Residual()
    positions = 4 * 4
    assert count_macs(model, X) == positions * (8 * 3 * 9 + 2 * 8 * 12 * 9) + 8 * 10


def multihead():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", [Residual, Mixed, Attention, multihead])
def test_count_agrees_with_torch(build, frozen):
    model = build().eval()
    x = torch.zeros(1, 5, 16) if build is multihead else X[:1]
    # Gradients on and plain products: the counter of some releases sees into neither the fast path nor a fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    model.requires_grad_(not frozen)
    assert count_macs(model, x) * 2 == counter.get_total_flops()


def test_multihead_attention_width():
    """nn.MultiheadAttention has one width, on both sides of both projections."""
    model = nn.Sequential(nn.Linear(3, 16), multihead(), nn.Linear(16, 5))
    slices = (
        part("0", "out", 16),
        part("1.self_attn", "in", 16),
        part("1.self_attn", "out", 16),
        part("1.norm1", "norm", 16),
        part("1.norm2", "norm", 16),
        part("1.linear1", "in", 16),
        part("1.linear2", "out", 16),
        part("2", "in", 16),
    )
    x = torch.zeros(1, 5, 3)
    cost = cost_model(model, x, [ChannelGroup("0", 16, slices)])
    small = nn.Sequential(nn.Linear(3, 10), nn.TransformerEncoderLayer(10, 2, 32, batch_first=True), nn.Linear(10, 5))
    assert cost.macs({"0": 10}) == count_macs(small, x)
    assert cost.params({"0": 10}) == count_params(small)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_weights_computed_on_the_fly_are_counted_with_their_layer():
    def build(width):
        return nn.Sequential(StandardisedConv(3, width, 3), nn.ReLU(), StandardisedConv(width, 4, 3))

    group = ChannelGroup("0", 8, (part("0", "out", 8), part("2", "in", 8)))
    cost = cost_model(build(8), X, [group])
    assert cost.macs({"0": 3}) == count_macs(build(3), X)


def test_a_shared_layer_counts_its_macs_twice_and_its_parameters_once():
    class Shared(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first = nn.Conv2d(3, width, 1)
            self.again = nn.Conv2d(width, width, 1)
            self.alias = self.again

        def forward(self, x):
            return self.alias(self.again(self.first(x)))

    slices = (part("first", "out", 8), part("again", "in", 8), part("alias", "out", 8))
    cost = cost_model(Shared(8), X, [ChannelGroup("first", 8, slices)])
    for width in (8, 5):
        assert cost.macs({"first": width}) == count_macs(Shared(width), X) == 64 * (3 * width + 2 * width**2)
        assert cost.params({"first": width}) == count_params(Shared(width))


def test_marginal_is_the_derivative():
    cost = cost_model(Mixed(), X, Mixed.groups())
    keep = {"left": 5, "right": 3, "mix": 8}
    for metric in ("macs", "params", "channels"):
        slopes = cost.marginal(keep, metric)
        for name in keep:
            above, below = (cost.form(metric).value(cost.counts(keep | {name: keep[name] + d})) for d in (1, -1))
            assert slopes[name] == pytest.approx((above - below) / 2)


def test_the_model_leaves_as_it_came():
    model = Residual().train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    cost_model(model, X, Residual.groups())
    assert model.training and model.conv1.training and not model.norm.training
    assert not model.stem.weight.requires_grad and model.conv1.weight.requires_grad
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        count_macs(model, torch.zeros(1, 4, 8, 8))
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_a_candidate_costs_microseconds():
    cost = cost_model(Mixed(), X, Mixed.groups())
    start = time.process_time()
    for _ in range(500):
        cost.macs({"left": 3})
    assert (time.process_time() - start) / 500 < 1e-3


def test_unknown_names_are_refused():
    cost = cost_model(Residual(), X, Residual.groups())
    with pytest.raises(UsageError, match="no group 'stm'"):
        cost.macs({"stm": 3})
    with pytest.raises(UsageError, match="metric must be one of macs, params, channels, got 'flops'"):
        cost.cost({}, "flops")
    with pytest.raises(UsageError, match="same name"):
        cost_model(Residual(), X, Residual.groups() * 2)
