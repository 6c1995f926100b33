"""A pruned model equals its masked self, whatever its structure; what fails is undone without a trace."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from builders.surgery_models import (
    MODELS,
    Grouped,
    Mlp,
    Residual,
    ResponseNorm,
    StaleWideResNet,
    Unprunable,
    example,
    images,
    make_plan,
    plan_of,
    vit,
)
from builders.weights import randomised
from torch import nn

from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.models.manifest import apply_changes, describe_changes
from robust_prune.structure.groups import GroupSearch, find_groups
from robust_prune.surgery.apply import apply


def zero_by_hand(model: nn.Module, search: GroupSearch, plan: PruningPlan) -> nn.Module:
    """An oracle without any of the library's code: the rows that produce and the columns that read become zero."""
    model = copy.deepcopy(model)
    removed = {p.name: set(p.removed) for p in plan.groups}
    with torch.no_grad():
        for group in search.groups:
            for part in group.slices:
                gone = [i for i, r in zip(part.index, part.root, strict=True) if r in removed[group.name]]
                if part.side == "out":
                    layer = model.get_submodule(part.target)
                    layer.weight[gone] = 0
                    if layer.bias is not None:
                        layer.bias[gone] = 0
                elif part.side == "in" and getattr(model.get_submodule(part.target), "groups", 1) == 1:
                    model.get_submodule(part.target).weight[:, gone] = 0
                elif part.side == "norm" and hasattr(model.get_submodule(part.target), "running_mean"):
                    model.get_submodule(part.target).weight[gone] = 0
                    model.get_submodule(part.target).bias[gone] = 0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_group_goes_and_the_result_is_smaller_and_exact(name: str) -> None:
    model = randomised(MODELS[name]())
    search = find_groups(model, example())
    plan = plan_of(search)
    result = apply(model, plan, example())
    assert result.rolled_back == () and result.applied == plan.groups and len(plan.groups) >= 1
    assert result.parity < 1e-7
    for planned, group in zip(plan.groups, search.groups, strict=True):
        part = group.slices[0]
        lost = sum(root in planned.removed for root in part.root)
        dense, small = (each.get_submodule(part.target).weight for each in (model, result.model))
        assert len(small) == len(dense) - lost and lost > 0
    x = images().requires_grad_()
    logits = result.model(x)
    assert logits.shape == (5, 5)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["residual", "concat", "flatten", "gate", "wide_resnet"])
def test_pruned_equals_the_model_zeroed_by_hand(name: str) -> None:
    model = randomised(MODELS[name]()).double()
    search = find_groups(model, example())
    plan = plan_of(search, 0.4)
    small = apply(model, plan, example()).model
    with torch.no_grad():
        x = images().double()
        wanted = zero_by_hand(model, search, plan)(x)
        assert not torch.allclose(wanted, model(x), rtol=1e-3)  # the cut is felt
        torch.testing.assert_close(small(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9])
def test_layer_norm_keeps_its_channels_in_order(ratio: float) -> None:
    model = randomised(Mlp(192))
    with torch.no_grad():
        model.norm.weight.copy_(torch.arange(192.0))
    plan = plan_of(find_groups(model, example()), ratio)
    result = apply(model, plan, example())
    gone = set(next(p for p in plan.groups if p.name == "embed").removed)
    assert result.model.norm.weight.tolist() == [float(i) for i in range(192) if i not in gone]
    assert result.model.norm.normalized_shape == (192 - len(gone),)
    assert result.parity < 1e-7


def test_a_remembered_channel_count_is_repaired() -> None:
    model = randomised(StaleWideResNet(10))
    plan = plan_of(find_groups(model, example()))
    result = apply(model, plan, example())
    assert result.rolled_back == ()
    assert result.model.nChannels == 5 and model.nChannels == 10
    assert result.edits == ("nChannels",)


def test_a_mean_over_cut_channels_is_made_up_for() -> None:
    model = randomised(ResponseNorm())
    search = find_groups(model, example())
    assert [g.name for g in search.groups] == ["stem"]
    result = apply(model, plan_of(search), example())
    assert result.rolled_back == () and result.parity < 1e-7
    assert result.edits == ("norm.weight", "norm.eps")
    kept = [i for i in range(12) if i not in plan_of(search).groups[0].removed]
    torch.testing.assert_close(result.model.norm.weight, 2 * model.norm.weight[kept])
    assert result.model.norm.eps == pytest.approx(0.02) and result.model.norm.rate == 0.1
    fresh = ResponseNorm()
    apply_changes(fresh, json.loads(json.dumps(describe_changes(model, result.model))))
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh.eval()(images()), result.model.eval()(images()))


def test_attention_keeps_its_temperature_on_both_paths() -> None:
    model = randomised(vit()).double()
    result = apply(model, plan_of(find_groups(model, example())), example())
    attention = result.model.blocks[0].attn
    assert (attention.num_heads, attention.head_dim) == (2, 6)
    assert attention.scale == pytest.approx(6**-0.5)
    with torch.no_grad():
        fused = result.model(images().double())
        for block in result.model.blocks:
            block.attn.fused_attn = not block.attn.fused_attn
        torch.testing.assert_close(result.model(images().double()), fused, rtol=1e-6, atol=1e-8)


def test_a_group_that_fails_is_rolled_back_and_the_others_go() -> None:
    model = randomised(Unprunable())
    plan = plan_of(find_groups(model, example()))
    bad = PlannedGroup("fixed", 8, (0, 3, 5), 0.0)
    result = apply(model, make_plan(*plan.groups, bad), example())
    assert [r.name for r in result.rolled_back] == ["fixed"]
    assert result.rolled_back[0].reason
    assert [p.name for p in result.applied] == [p.name for p in plan.groups]
    assert result.model.fixed.out_channels == 8 and result.model.stem.out_channels == 8


def test_rolling_everything_back_leaves_the_model_bit_identical() -> None:
    model = randomised(Unprunable())
    result = apply(model, make_plan(PlannedGroup("fixed", 8, (0, 3, 5), 0.0)), example())
    assert result.applied == () and len(result.rolled_back) == 1
    assert result.model is not model
    assert describe_changes(model, result.model) == {"attributes": {}, "shapes": {}}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in result.model.state_dict().items())
    assert torch.equal(result.model(images()), model(images()))


@pytest.mark.parametrize(
    ("planned", "reason"),
    [
        (PlannedGroup("nothing", 4, (0,), 0.0), "no prunable group"),
        (PlannedGroup("fc", 5, (0,), 0.0), "no prunable group"),
        (PlannedGroup("a", 9, (0,), 0.0), "expects 9 channels"),
        (PlannedGroup("a", 8, (8,), 0.0), "0..7"),
        (PlannedGroup("a", 8, (1, 1), 0.0), "distinct"),
        (PlannedGroup("a", 8, tuple(range(8)), 0.0), "all of its channels"),
        (PlannedGroup("b", 16, (0, 1, 2, 3), 0.0), "4 blocks"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_its_reason(planned: PlannedGroup, reason: str) -> None:
    result = apply(randomised(Grouped()), make_plan(planned), example())
    assert result.applied == ()
    assert reason in result.rolled_back[0].reason


def test_grouped_layers_may_lose_different_channels_in_each_block() -> None:
    model = randomised(Grouped())
    removed = (0, 1, 6, 7, 8, 10, 13, 15)
    result = apply(model, make_plan(PlannedGroup("b", 16, removed, 0.0)), example())
    assert result.rolled_back == () and result.parity < 1e-7
    assert result.model.grouped.weight.shape == (24, 2, 3, 3)
    assert torch.equal(result.model.grouped.weight[6:12], model.grouped.weight[6:12][:, [0, 1]])


def test_everything_about_the_model_but_its_widths_is_kept() -> None:
    model = randomised(Residual()).to(memory_format=torch.channels_last).train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    calls: list[int] = []
    model.conv2.register_forward_hook(lambda module, inputs, output: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    result = apply(model, plan_of(find_groups(model, example())), example()).model
    calls.clear()
    result.eval()(images())
    assert calls == [1]
    assert {n for n, p in result.named_parameters() if not p.requires_grad} == {"conv1.weight"}
    assert result.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and model.conv1.out_channels == 16


def test_modes_are_kept_module_by_module() -> None:
    model = randomised(Residual()).train()
    model.bn1.eval()
    result = apply(model, plan_of(find_groups(model, example())), example()).model
    assert {n: m.training for n, m in result.named_modules()} == {n: m.training for n, m in model.named_modules()}
