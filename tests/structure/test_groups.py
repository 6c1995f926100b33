"""Groups are found from the graph, are exact, and what cannot be proven is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from builders.surgery_models import (
    Concat,
    Flatten,
    Gate,
    Grouped,
    HeadMajorAttention,
    Residual,
    Reused,
    SeparateAttention,
    Unprunable,
    example,
    vit,
)
from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.structure import graph, groups
from robust_prune.structure.groups import find_groups
from robust_prune.structure.types import ChannelGroup, GroupSlice


def groups_of(model: nn.Module) -> dict[str, ChannelGroup]:
    return {g.name: g for g in find_groups(model, example()).groups}


def slice_of(group: ChannelGroup, target: str, side: str) -> GroupSlice:
    return next(s for s in group.slices if s.target == target and s.side == side)


def test_a_residual_sum_couples_its_producers_and_the_classifier_stays() -> None:
    search = find_groups(Residual(), example())
    assert [(g.name, g.channels) for g in search.groups] == [("stem", 12), ("conv1", 16)]
    stem = search.groups[0]
    assert set(stem.producers) == {"stem", "conv2"}
    assert (stem.slices[0].target, stem.slices[0].side, stem.blocks) == ("stem", "out", 1)
    assert {(s.target, s.side) for s in stem.slices} == {
        ("stem", "out"), ("bn0", "norm"), ("conv1", "in"), ("conv2", "out"), ("bn2", "norm"), ("fc", "in"),
    }  # fmt: skip
    assert search.skipped == ()


def test_depthwise_follows_its_input_and_grouped_layers_set_blocks() -> None:
    groups = groups_of(Grouped())
    assert set(groups) == {"a", "b", "grouped"}
    assert slice_of(groups["a"], "depthwise", "out").index == tuple(range(8))
    assert groups["a"].blocks == 1
    assert groups["b"].blocks == 4
    assert slice_of(groups["b"], "act", "norm").root == tuple(range(16))
    assert groups["grouped"].blocks == 4  # of 4 convolution groups and 2 norm groups


def test_concatenation_shifts_indices() -> None:
    groups = groups_of(Concat())
    right = slice_of(groups["right"], "bn", "norm")
    assert right.index == tuple(range(6, 16))
    assert right.root == tuple(range(10))


def test_flattening_spreads_a_channel_over_its_positions() -> None:
    part = slice_of(groups_of(Flatten())["features.0"], "classifier.0", "in")
    assert part.index == tuple(range(32))
    assert part.root == tuple(i // 4 for i in range(32))


def test_channels_that_meet_are_one_channel() -> None:
    group = groups_of(Gate())["conv"]
    assert group.channels == 6
    assert group.slices[0].root == (0, 1, 2, 3, 4, 5) * 2


def test_fused_attention_has_a_block_a_head_and_the_embedding_reaches_free_parameters() -> None:
    groups = groups_of(vit())
    assert set(groups) == {"patch_embed.proj"} | {f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "mlp.fc1")}
    qkv = groups["blocks.0.attn.qkv"]
    assert (qkv.channels, qkv.blocks) == (24, 2)
    assert qkv.slices[0].root == tuple(range(24)) * 3
    stream = groups["patch_embed.proj"]
    assert {(s.target, s.dim) for s in stream.slices if s.side == "param"} == {("cls_token", 2), ("pos_embed", 2)}


def test_separate_attention_layers_are_one_group() -> None:
    group = groups_of(SeparateAttention())["q"]
    assert group.producers == ("q", "k", "v")
    assert (group.channels, group.blocks) == (24, 2)


def test_the_row_order_of_a_fused_layer_is_found_by_proof() -> None:
    qkv = groups_of(HeadMajorAttention())["qkv"]
    assert (qkv.channels, qkv.blocks) == (16, 4)
    assert qkv.slices[0].root[:16] == (0, 1, 2, 3) * 3 + (4, 5, 6, 7)


def test_a_model_that_autograd_cannot_follow_is_refused_clearly() -> None:
    class Detached(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(UsageError, match="Detached could not be traced"):
        find_groups(Detached(), example())


def test_attention_with_normalised_queries_is_refused_and_the_rest_goes() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=5, qk_norm=True)
    search = find_groups(model, example())
    assert [g.name for g in search.groups] == ["patch_embed.proj", "blocks.0.mlp.fc1"]
    assert [(r.name, "normalised per head" in r.reason) for r in search.skipped] == [("blocks.0.attn.qkv", True)]


def test_an_unprunable_block_is_named_with_its_reason_while_others_go() -> None:
    search = find_groups(Unprunable(), example())
    assert [g.name for g in search.groups] == ["stem", "mix"]
    reasons = {r.name: r.reason for r in search.skipped}
    assert set(reasons) <= {"fixed", "sorted"} and "fixed" in reasons
    assert all(len(r) > 20 for r in reasons.values())


def test_a_layer_that_runs_twice_is_cut_on_both_sides_or_refused() -> None:
    search = find_groups(Reused(), example())
    assert "after" in {g.name for g in search.groups}
    for group in search.groups:
        if "twice" in group.producers:
            assert {s.side for s in group.slices if s.target == "twice"} == {"in", "out"}


class TwoHeads(nn.Module):
    """The logits are a mean of a linear and a convolutional classifier, neither named like one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Linear(8, 5)
        self.two = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        return (self.one(x.mean((2, 3))) + self.two(x).mean((2, 3))) / 2


def test_every_layer_that_makes_the_logits_is_protected_and_not_listed() -> None:
    search = find_groups(TwoHeads(), example())
    assert [g.name for g in search.groups] == ["body"]
    assert search.skipped == ()


class Deaf(Residual):
    """A branch that the logits multiply by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = nn.Conv2d(3, 4, 1)
        self.read = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.read(self.dead(x)).mean((2, 3))


def test_a_group_that_the_logits_do_not_feel_is_refused_since_its_proof_would_be_empty() -> None:
    search = find_groups(Deaf(), example())
    assert [g.name for g in search.groups] == ["stem", "conv1"]
    assert [r.name for r in search.skipped] == ["dead"]
    assert "do not depend" in search.skipped[0].reason


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(torch.relu(self.stem(x)))))).mean((2, 3)))


def test_tied_weights_are_refused() -> None:
    search = find_groups(Tied(), example())
    assert search.groups == ()
    assert all("shares the parameter" in r.reason for r in search.skipped) and search.skipped


def test_frozen_parameters_are_found_and_nothing_of_the_model_moves() -> None:
    model = Residual().train()
    model.requires_grad_(False)
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    assert len(find_groups(model, example()).groups) == 2
    assert not any(p.requires_grad for p in model.parameters())
    assert model.training and not model.bn1.training and model.bn2.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrappers_are_looked_through() -> None:
    assert [g.name for g in find_groups(nn.DataParallel(Residual()), example()).groups] == ["stem", "conv1"]
    compiled = torch.compile(Residual())
    assert [g.name for g in find_groups(compiled, example()).groups] == ["stem", "conv1"]  # type: ignore[arg-type]


def test_propagation_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_STEP_LIMIT", 1)
    monkeypatch.setattr(groups, "find_traced", lambda bench, found: [])
    search = find_groups(Residual(), example())
    assert search.groups == ()
    assert all("did not end" in r.reason for r in search.skipped) and search.skipped


def test_where_the_graph_fails_values_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = find_groups(Residual(), example())
    monkeypatch.setattr(graph, "_STEP_LIMIT", 1)
    search = find_groups(Residual(), example())
    assert [(g.name, g.channels, g.blocks, g.traced) for g in search.groups] == [
        ("stem", 12, 1, True), ("conv1", 16, 1, True),
    ]  # fmt: skip
    assert [set(g.slices) for g in search.groups] == [set(g.slices) for g in wanted.groups]
    assert search.skipped == ()


def test_torch_prunings_own_functions_are_left_alone() -> None:
    from torch_pruning.pruner.function import LayernormPruner, PrunerBox

    find_groups(Residual(), example())
    assert not any(type(p).__module__.startswith("robust_prune") for p in PrunerBox.values())
    assert LayernormPruner.prune_out_channels.__module__ == "torch_pruning.pruner.function"


@pytest.mark.parametrize("old_style", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_reparametrised_weights_are_refused_by_name(old_style: bool) -> None:
    model = Residual()
    make = nn.utils.weight_norm if old_style else nn.utils.parametrizations.weight_norm
    make(model.conv1)
    with pytest.raises(UsageError, match=r"conv1 .* re-parametrises"):
        find_groups(model, example())


def test_unusable_requests_say_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"\[1, C, H, W\]"):
        find_groups(Residual(), torch.rand(2, 3, 8, 8))
    with pytest.raises(UsageError, match="number of channels"):
        find_groups(Residual(), torch.rand(1, 4, 8, 8))
    with pytest.raises(UsageError, match=r"logits \[N, K\]"):
        find_groups(nn.Conv2d(3, 4, 3), example())
