"""Channels that hang together are found by watching values, also where the graph has it wrong."""

from __future__ import annotations

import json

import pytest
import torch
from builders.surgery_models import (
    MODELS,
    Caching,
    ChannelAttention,
    Scales,
    SplitAttention,
    TiedAttention,
    example,
    plan_of,
)
from builders.weights import randomised
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from robust_prune.budget.types import PruningPlan
from robust_prune.serialization import from_json, to_json
from robust_prune.structure.groups import find_groups
from robust_prune.structure.tracing import TracedGroup, trace_groups
from robust_prune.structure.trial import Trial
from robust_prune.structure.types import GroupSlice
from robust_prune.surgery.apply import apply


def traced(model: nn.Module, **options: object) -> dict[str, TracedGroup]:
    trial = Trial(model.eval(), example())
    return {g.root: g for g in trace_groups(trial.dense, trial.images[:1], **options)}  # type: ignore[arg-type]


def slices(group: TracedGroup) -> dict[tuple[str, str], GroupSlice]:
    return {(s.target, s.side): s for s in group.coupling.slices}


@pytest.mark.parametrize("name", ["residual", "concat", "flatten", "gate", "mlp", "wide_resnet"])
def test_it_finds_what_the_graph_finds(name: str) -> None:
    search = find_groups(MODELS[name](), example())
    found = traced(MODELS[name]())
    assert not any(g.traced for g in search.groups)
    assert {g.name: set(g.slices) for g in search.groups} == {n: set(g.coupling.slices) for n, g in found.items()}


def test_parts_of_a_split_must_lose_equally_many() -> None:
    group = traced(Scales())["expand"]
    assert (group.coupling.channels, group.blocks) == (18, 3)
    parts = slices(group)
    assert parts["convs.0", "in"].root == tuple(range(6))
    assert parts["convs.1", "in"].root == parts["convs.0", "out"].root == tuple(range(6, 12))
    assert parts["join", "in"].index == (*range(6), *range(12, 18))  # second's own part has another root
    assert slices(traced(Scales())["convs.1"])["join", "in"].index == tuple(range(6, 12))


def test_maps_that_are_summed_go_together() -> None:
    group = traced(SplitAttention())["conv"]
    assert (group.coupling.channels, group.blocks) == (8, 1)
    for place in (("conv", "out"), ("fc2", "out")):
        assert slices(group)[place].root == (*range(8), *range(8))


def test_what_is_mixed_is_left_out_and_so_is_what_others_hold() -> None:
    assert set(traced(ChannelAttention())) == {"stem"}
    held = GroupSlice("join", "in", (0, 7), (0, 1))
    groups = traced(Scales(), taken=[held])
    assert (groups["expand"].coupling.channels, groups["expand"].blocks) == (15, 3)  # five from each part
    assert groups["convs.1"].coupling.channels == 5
    assert "expand" not in traced(Scales(), skip={"expand"})


def test_the_model_is_left_as_it_was() -> None:
    model = randomised(Scales())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace_groups(model, example())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_split_size_is_repaired() -> None:
    model = randomised(Scales())
    result = apply(model, plan_of(find_groups(model, example())), example())
    assert result.edits == ("width",) and result.model.width == 3 and model.width == 6


def test_widths_that_only_code_ties_are_bundled() -> None:
    search = find_groups(TiedAttention(), example())
    (bundle,) = search.groups
    assert bundle.members == ("embed", "q") and bundle.blocks == 2 and search.skipped == ()
    assert {(s.target, s.side) for s in bundle.slices} == {
        ("embed", "out"), ("norm", "norm"), ("q", "in"), ("kv", "in"), ("proj", "out"), ("head", "in"),
        ("q", "out"), ("kv", "out"), ("proj", "in"),
    }  # fmt: skip
    model = randomised(TiedAttention())
    plan = plan_of(find_groups(model, example()), 0.25)
    stored = from_json(PruningPlan, json.loads(json.dumps(to_json(plan))))
    assert stored == plan
    result = apply(model, stored, example())
    assert result.rolled_back == () and result.parity < 1e-7
    assert (result.model.q.out_features, result.model.kv.out_features, result.model.embed.out_channels) == (12, 24, 12)
    assert result.model.head_dim == 6


def test_attention_whose_layers_are_never_called_is_found_by_their_weights() -> None:
    """torchvision's Swin hands the weights of its linear layers to a function, and takes widths from the input."""
    model = SwinTransformer([2, 2], 12, [2, 2], [3, 3], [2, 2], num_classes=5)
    model = randomised(model).eval()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    search = find_groups(model, image)
    assert not search.skipped
    done = apply(model, from_json(PruningPlan, json.loads(json.dumps(to_json(plan_of(search))))), image)
    assert not done.rolled_back
    block = done.model.get_submodule("features.1.1.attn")
    assert block.qkv.out_features == 18 and block.proj.in_features == block.qkv.in_features == 6
    assert done.model.head.in_features == 12


def test_what_a_model_has_kept_from_other_weights_is_dropped() -> None:
    model = Caching().eval()
    with torch.no_grad():
        model(example())
        model.bias.fill_(0.5)  # `kept` is stale now
    assert [g.name for g in find_groups(model, example()).groups] == ["stem"]


class Fickle(nn.Module):
    """Takes another way at every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Linear(6, 5))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.a(x)
        y = self.b(y if self.calls % 2 else y[:, :, 1:])
        return self.c(y.mean((2, 3)))


class Picky(nn.Module):
    """Bears no values but its own, and has a layer that the graph cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if not torch.equal(y, nn.functional.conv2d(x, self.a.weight, self.a.bias)):
            raise ValueError("not my values")
        y = self.b(y)
        return self.c(y.view(len(y), 3, 2, -1).sum((2, 3)))


def test_a_model_that_bears_no_other_values_is_pruned_as_far_as_the_graph_goes() -> None:
    with pytest.raises(ValueError, match="not my values"):
        trace_groups(Picky().eval(), example())
    search = find_groups(Picky(), example())
    assert [g.name for g in search.groups] == ["a"]
    assert [r.name for r in search.skipped] == ["b"]


def test_a_model_that_changes_its_way_is_refused() -> None:
    from robust_prune.structure.graph import BrokenMapping

    with pytest.raises(BrokenMapping, match="same layers in every pass"):
        trace_groups(Fickle().eval(), example())
