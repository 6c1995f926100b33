"""Channel scores: what they mean, and the contract that every criterion keeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_prune.attacks.threat import ThreatModel
from robust_prune.catalogue import CRITERIA
from robust_prune.errors import UsageError
from robust_prune.ranking.group_weights import per_channel
from robust_prune.ranking.importance import (
    channel_scores,
    removal_order,
    removed_fraction_curve,
)
from robust_prune.ranking.taylor import TAYLOR_BATCH
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.structure.types import ChannelGroup, GroupSlice

THREAT = ThreatModel()


def part(target: str, side: str, index: list[int], root: list[int] | None = None, dim: int = 0) -> GroupSlice:
    return GroupSlice(target, side, tuple(index), tuple(root or index), dim)  # type: ignore[arg-type]


@pytest.fixture
def model() -> nn.Module:
    """conv-bn-relu-conv-flatten-linear, with batch-norm statistics that are not at init."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 5),
    ).double()
    norm = net[1]
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.copy_(torch.rand_like(tensor) + 0.2)
    return net.eval()


@pytest.fixture
def adv() -> AdversarialSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(TAYLOR_BATCH + 8, 3, 8, 8, generator=generator)
    return AdversarialSet(images, torch.randint(5, (len(images),), generator=generator), THREAT, 0)


FIRST = ChannelGroup(
    "0",
    4,
    (part("0", "out", [0, 1, 2, 3]), part("1", "norm", [0, 1, 2, 3]), part("3", "in", [0, 1, 2, 3])),
)
SECOND = ChannelGroup(
    "3",
    6,
    (part("3", "out", list(range(6))), part("6", "in", list(range(54)), [i // 9 for i in range(54)])),
)
GROUPS = (FIRST, SECOND)


def gated_derivative(model: nn.Module, x: Tensor, y: Tensor, after: int, channels: int) -> Tensor:
    """Derivative of the loss when the channels behind layer `after` are scaled: the removal's first-order effect."""
    gate = torch.ones(channels, dtype=torch.float64, requires_grad=True)
    hidden = model[: after + 1](x.double()) * gate.view(1, -1, 1, 1)
    return torch.autograd.grad(F.cross_entropy(model[after + 1 :](hidden), y), gate)[0]


def test_taylor_is_the_first_order_effect_of_removal(model: nn.Module, adv: AdversarialSet) -> None:
    found = channel_scores(model, GROUPS, "adversarial_taylor", adv)
    for group, after in ((FIRST, 2), (SECOND, 4)):
        squares = torch.zeros(group.channels, dtype=torch.float64)
        for start, stop in ((0, TAYLOR_BATCH), (TAYLOR_BATCH, len(adv))):
            change = gated_derivative(model, adv.images[start:stop], adv.labels[start:stop], after, group.channels)
            squares += change.square() * (stop - start)
        expected = squares.sqrt()
        torch.testing.assert_close(found[group.name], expected / expected.mean(), rtol=1e-9, atol=0)


def test_taylor_predicts_the_loss_of_a_small_cut(model: nn.Module, adv: AdversarialSet) -> None:
    few = AdversarialSet(adv.images[:8], adv.labels[:8], THREAT, 0)
    scores = channel_scores(model, GROUPS, "adversarial_taylor", few)["0"]
    step = 1e-5
    with torch.no_grad():
        base = F.cross_entropy(model(few.images.double()), few.labels)
        changes = []
        for channel in range(4):
            weight = model[3].weight[:, channel].clone()
            model[3].weight[:, channel] *= 1 - step
            changes.append(float(F.cross_entropy(model(few.images.double()), few.labels) - base) / step)
            model[3].weight[:, channel] = weight
    expected = torch.tensor(changes, dtype=torch.float64).abs()
    torch.testing.assert_close(scores, expected / expected.mean(), rtol=1e-3, atol=1e-6)


def test_norm_slices_tell_the_same_as_readers(model: nn.Module, adv: AdversarialSet) -> None:
    readers = channel_scores(model, [FIRST], "adversarial_taylor", adv)["0"]
    norms = channel_scores(model, [ChannelGroup("0", 4, FIRST.slices[:2])], "adversarial_taylor", adv)["0"]
    torch.testing.assert_close(norms, readers, rtol=1e-8, atol=0)
    writers = channel_scores(model, [ChannelGroup("0", 4, FIRST.slices[:1])], "adversarial_taylor", adv)["0"]
    assert not torch.allclose(writers, readers, rtol=1e-3)


class TinyViT(nn.Module):
    """One attention block with a fused query-key-value layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        tokens = self.embed(F.unfold(x, 2, stride=2).transpose(1, 2))
        parts = self.qkv(tokens).unflatten(-1, (3, 8))
        if gate is not None:
            parts = parts * gate
        q, k, v = parts.unflatten(-1, (2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((tokens + self.proj(mixed)).mean(1))


def test_attention_dimensions_count_queries_and_values() -> None:
    torch.manual_seed(0)
    model = TinyViT().double()
    few = AdversarialSet(torch.rand(6, 3, 4, 4), torch.randint(5, (6,)), THREAT, 0)
    rows = list(range(24))
    slices = (part("qkv", "out", rows, [r % 8 for r in rows]), part("proj", "in", list(range(8))))
    found = channel_scores(model, [ChannelGroup("qkv", 8, slices, 2)], "adversarial_taylor", few)["qkv"]
    # Zeroing a dimension of q, k and v leaves the logits as zeroing it in q and v alone does: the product is gone.
    gate = torch.ones(3, 8, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(model(few.images.double(), gate), few.labels), gate)
    torch.testing.assert_close(slope[0], slope[1])
    torch.testing.assert_close(found, unit((slope[0] + slope[2]).abs()))


def test_clean_and_adversarial_taylor_read_their_own_images(model: nn.Module, adv: AdversarialSet) -> None:
    other = (adv.images.flip(0) * 0.5, adv.labels)
    as_clean = channel_scores(model, GROUPS, "clean_taylor", None, (adv.images, adv.labels))
    as_adv = channel_scores(model, GROUPS, "adversarial_taylor", adv, other)
    assert all(torch.equal(as_clean[name], as_adv[name]) for name in as_adv)
    assert not torch.allclose(channel_scores(model, GROUPS, "clean_taylor", adv, other)["0"], as_clean["0"])


def test_taylor_ignores_large_batch_sizes(model: nn.Module, adv: AdversarialSet) -> None:
    one = channel_scores(model, GROUPS, "adversarial_taylor", adv, batch_size=256)
    two = channel_scores(model, GROUPS, "adversarial_taylor", adv, batch_size=TAYLOR_BATCH)
    assert all(torch.equal(one[name], two[name]) for name in one)


def unit(scores: Tensor) -> Tensor:
    return scores / scores.mean()


def test_weight_criteria_match_their_definitions(model: nn.Module) -> None:
    first, norm, second, head = (model[i].weight.detach() for i in (0, 1, 3, 6))
    magnitude = channel_scores(model, GROUPS, "magnitude")
    torch.testing.assert_close(magnitude["0"], unit(first.flatten(1).norm(dim=1)))
    torch.testing.assert_close(magnitude["3"], unit(second.flatten(1).norm(dim=1)))
    grouped = channel_scores(model, GROUPS, "group_norm")
    squares = [(first[c].square().sum() + norm[c] ** 2 + second[:, c].square().sum()) for c in range(4)]
    torch.testing.assert_close(grouped["0"], unit(torch.stack(squares).sqrt()))
    squares = [second[c].square().sum() + head[:, 9 * c : 9 * c + 9].square().sum() for c in range(6)]
    torch.testing.assert_close(grouped["3"], unit(torch.stack(squares).sqrt()))
    scale = channel_scores(model, GROUPS, "bn_scale")
    torch.testing.assert_close(scale["0"], unit(norm.abs()))
    torch.testing.assert_close(scale["3"], magnitude["3"])


def test_random_is_seeded(model: nn.Module) -> None:
    one, two, three = (channel_scores(model, GROUPS, "random", seed=s) for s in (0, 0, 1))
    assert torch.equal(one["3"], two["3"]) and not torch.equal(one["3"], three["3"])


@pytest.mark.parametrize("criterion", ["fpgm", "lamp"])
def test_torch_prunings_criteria_are_its_own_on_its_own_groups(model: nn.Module, criterion: str) -> None:
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, (torch.rand(1, 3, 8, 8, dtype=torch.float64),))
    scorer = {"fpgm": tp.importance.FPGMImportance, "lamp": tp.importance.LAMPImportance}[criterion]()
    found = channel_scores(model, GROUPS, criterion)
    for name, layer in (("0", model[0]), ("3", model[3])):
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        torch.testing.assert_close(found[name], unit(scorer(group).double()))


def test_hessian_is_the_mean_over_single_images(model: nn.Module, adv: AdversarialSet) -> None:
    first, norm, second = model[0].weight, model[1].weight, model[3].weight
    totals = [torch.zeros_like(w) for w in (first, norm, second)]
    for x, y in zip(adv.images.double().split(1), adv.labels.split(1), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), (first, norm, second))
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.square() / len(adv)
    parts = [(w.detach().square() * h) for w, h in zip((first, norm, second), totals, strict=True)]
    expected = parts[0].sum((1, 2, 3)) + parts[1] + parts[2].sum((0, 2, 3))
    found = channel_scores(model, [FIRST], "hessian", None, (adv.images, adv.labels))["0"]
    torch.testing.assert_close(found, unit(expected), rtol=1e-5, atol=0)
    with pytest.raises(UsageError, match="'hessian' needs clean images"):
        channel_scores(model, [FIRST], "hessian", adv)


@pytest.mark.parametrize("criterion", CRITERIA.names)
def test_every_criterion_keeps_the_contract(model: nn.Module, adv: AdversarialSet, criterion: str) -> None:
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        scores = channel_scores(model, GROUPS, criterion, adv, (adv.images, adv.labels))
    assert list(scores) == ["0", "3"]
    for group in GROUPS:
        values = scores[group.name]
        assert values.shape == (group.channels,) and values.dtype == torch.float64 and values.min() >= 0
        assert float(values.mean()) == pytest.approx(1)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert model.training and not model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(weights) - 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_convolutions_are_indexed_by_channel(groups: int, transposed: bool) -> None:
    torch.manual_seed(0)
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(6, 12, 3, padding=1, groups=groups, bias=False).double()
    model = nn.Sequential(conv)
    x = torch.rand(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    cotangent = torch.rand_like(y)
    by_weight, by_input = torch.autograd.grad((y * cotangent).sum(), (conv.weight, x))
    product = conv.weight.detach() * by_weight
    # Euler: for a bilinear map, w·∂/∂w over what reads a channel equals x·∂/∂x, over what writes one y·∂/∂y.
    inputs = per_channel(model, part("0", "in", list(range(6))), product, 6)
    torch.testing.assert_close(inputs, (x * by_input).sum((0, 2, 3)).detach())
    outputs = per_channel(model, part("0", "out", list(range(12))), product, 12)
    torch.testing.assert_close(outputs, (y * cotangent).sum((0, 2, 3)).detach())


def test_partial_and_shuffled_indices_are_mapped_to_channels() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False))
    model[0].weight.data.copy_(torch.arange(24.0).view(6, 4))
    found = per_channel(model, part("0", "out", [5, 2, 3], [0, 1, 0]), model[0].weight.detach(), 2)
    rows = model[0].weight.detach().double().sum(1)
    assert found.tolist() == [float(rows[5] + rows[3]), float(rows[2])]


def test_free_parameters_and_attention_count_in_group_norm() -> None:
    class WithScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.scale = nn.Parameter(torch.rand(1, 4, 2))
            self.attention = nn.MultiheadAttention(4, 2)

    torch.manual_seed(0)
    model = WithScale()
    channels = [0, 1, 2, 3]
    slices = (part("linear", "out", channels), part("scale", "param", channels, dim=1))
    attention = (part("attention", "in", channels), part("attention", "out", channels))
    squares = model.linear.weight.square().sum(1) + model.scale.square().sum((0, 2))
    found = channel_scores(model, [ChannelGroup("linear", 4, slices)], "group_norm")["linear"]
    torch.testing.assert_close(found, unit(squares.detach().sqrt()).double())
    squares = squares + model.attention.in_proj_weight.square().sum(0) + model.attention.out_proj.weight.square().sum(1)
    found = channel_scores(model, [ChannelGroup("linear", 4, slices + attention)], "group_norm")["linear"]
    torch.testing.assert_close(found, unit(squares.detach().sqrt()).double())


def test_dead_channels_score_zero(model: nn.Module, adv: AdversarialSet) -> None:
    model[3].weight.data[:, 2] = 0
    assert channel_scores(model, [FIRST], "adversarial_taylor", adv)["0"][2] == 0
    model[3].weight.data.zero_()
    assert channel_scores(model, [FIRST], "adversarial_taylor", adv)["0"].tolist() == [0.0] * 4


def test_errors_name_what_is_wrong(model: nn.Module, adv: AdversarialSet) -> None:
    with pytest.raises(UsageError, match=re.escape(f"criterion must be one of {CRITERIA.help()}, got 'fisher'")):
        channel_scores(model, GROUPS, "fisher", adv)
    with pytest.raises(UsageError, match="needs an adversarial set"):
        channel_scores(model, GROUPS, "adversarial_taylor")
    with pytest.raises(UsageError, match="needs clean images"):
        channel_scores(model, GROUPS, "clean_taylor", adv)
    with pytest.raises(UsageError, match="needs batch-norm"):
        channel_scores(model, [SECOND], "bn_scale")
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        channel_scores(model, GROUPS, "magnitude", batch_size=0)
    with pytest.raises(UsageError, match="no convolution or linear"):
        channel_scores(model, [ChannelGroup("1", 4, FIRST.slices[1:2])], "magnitude")
    model[0].weight.data[1, 0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match="magnitude gives 1 of 4 channels of group '0' a score that is NaN"):
        channel_scores(model, GROUPS, "magnitude")
    with pytest.raises(UsageError, match="adversarial_taylor gives 4 of 4 channels"):
        channel_scores(model, GROUPS, "adversarial_taylor", adv)
    with pytest.raises(UsageError, match="expected a finite number"):
        removed_fraction_curve(model, FIRST, torch.ones(4))


def test_removed_fraction_is_the_norm_of_what_goes(model: nn.Module) -> None:
    scores = torch.tensor([3.0, 1.0, 4.0, 2.0])
    curve = removed_fraction_curve(model, FIRST, scores)
    weight = model[0].weight.detach()
    for k, gone in enumerate(([], [1], [1, 3], [1, 3, 0], [1, 3, 0, 2])):
        assert float(curve[k]) == pytest.approx(float(weight[gone].norm() / weight.norm()), abs=1e-12)


def test_removed_fraction_of_weights_that_are_zero(model: nn.Module) -> None:
    model[0].weight.data.zero_()
    assert not removed_fraction_curve(nn.DataParallel(model), FIRST, torch.ones(4)).any()


def test_removed_fraction_joins_all_producers(model: nn.Module) -> None:
    joint = ChannelGroup("0", 4, (part("0", "out", [0, 1, 2, 3]), part("3", "out", [5, 4, 1, 0], [0, 1, 2, 3])))
    curve = removed_fraction_curve(model, joint, torch.arange(4.0))
    a, b = model[0].weight.detach(), model[3].weight.detach()
    whole = (a.square().sum() + b.square().sum()).sqrt()
    assert float(curve[1]) == pytest.approx(float((a[0].square().sum() + b[5].square().sum()).sqrt() / whole))
    assert float(curve[-1]) < 1  # the group cuts four of the second producer's six outputs


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4).flatmap(
        lambda blocks: st.tuples(
            st.just(blocks),
            st.integers(1, 6).flatmap(lambda n: st.lists(st.floats(0, 9), min_size=n * blocks, max_size=n * blocks)),
        )
    )
)
def test_removal_order_keeps_blocks_equal(case: tuple[int, list[float]]) -> None:
    blocks, values = case
    group = ChannelGroup("g", len(values), (), blocks)
    scores = torch.tensor(values, dtype=torch.float64)
    order = removal_order(group, scores)
    width = len(values) // blocks
    assert sorted(order.tolist()) == list(range(len(values)))
    for k in range(0, len(values) + 1, blocks):
        gone = set(order[:k].tolist())
        for block in range(blocks):
            members = range(block * width, (block + 1) * width)
            out, stay = [c for c in members if c in gone], [c for c in members if c not in gone]
            assert len(out) == k // blocks
            assert not out or not stay or scores[out].max() <= scores[stay].min()


def test_removal_order_needs_one_score_a_channel() -> None:
    with pytest.raises(UsageError, match="has 4 channels, got scores of"):
        removal_order(FIRST, torch.ones(3))


def test_a_criterion_that_changes_the_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import torch\n\ndef ones(asked):\n    for p in asked.model.parameters():\n        p.data.zero_()\n"
        "    return {g.name: torch.ones(g.channels) for g in asked.groups}\n"
    )
    with pytest.raises(UsageError, match="changed the model's weights"):
        channel_scores(model, GROUPS, f"{mine}:ones")
