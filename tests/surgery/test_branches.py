"""Residual branches without channels are taken out: exactly, physically, and so that a file rebuilds the model."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from builders import surgery_models
from builders.branch_models import (
    MODELS,
    Around,
    Dropping,
    Made,
    Multiplied,
    Normed,
    OnlyInTraining,
    Padded,
    Residuals,
    images,
)
from builders.weights import randomised
from torch import nn

import robust_prune as rp
from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.errors import UsageError
from robust_prune.models import artifact
from robust_prune.models.branches import Branch, take_out, taken_out, traced_attributes
from robust_prune.models.manifest import apply_changes, describe_changes
from robust_prune.structure.branches import find_branch
from robust_prune.structure.groups import GroupSearch, find_groups
from robust_prune.surgery.apply import Surgery, apply
from robust_prune.surgery.reconstruction import reconstruct
from robust_prune.surgery.repair import fit_branches


def plan_without(search: GroupSearch, whole: Collection[str], others: float = 0.5) -> PruningPlan:
    """Remove all channels of the groups `whole`, and a share of the channels of all others."""

    def removed(group: object) -> tuple[int, ...]:
        part = group.channels // group.blocks
        gone = part if group.name in whole else int(others * part)
        return tuple(block * part + i for block in range(group.blocks) for i in range(gone))

    groups = tuple(PlannedGroup(g.name, g.channels, removed(g), None, g.traced, g.members) for g in search.groups)
    return PruningPlan(0.5, "macs", "uniform", "magnitude", 1, groups, (), 1, 1, 1, 1)


def cut(make: Callable[[], nn.Module], whole: Collection[str], others: float = 0.5) -> tuple[nn.Module, Surgery]:
    model = randomised(make()).eval()
    return model, apply(model, plan_without(find_groups(model, images()[:1]), whole, others), images()[:1])


def silenced(model: nn.Module, readers: Collection[str]) -> nn.Module:
    """An oracle without the library's code: what the readers return no longer depends on their inputs."""
    quiet = copy.deepcopy(model)
    for name in readers:
        nn.init.zeros_(quiet.get_submodule(name).weight)
    return quiet


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_without_branches_equals_the_one_in_which_they_say_nothing(kind: str) -> None:
    make, whole = MODELS[kind]
    model, surgery = cut(make, whole, others=0.0)
    assert surgery.rolled_back == () and len(surgery.branches) == len(whole)
    readers = [f"{branch.block}.{name}" for branch in surgery.branches for name in branch.readers]
    with torch.no_grad():
        wanted = silenced(model, readers)(images())
    assert torch.allclose(surgery.model(images()), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(model(images()), wanted, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
def test_no_layer_of_a_branch_is_left(kind: str) -> None:
    make, whole = MODELS[kind]
    _, surgery = cut(make, whole)
    left = {name for name, _ in surgery.model.named_modules()}
    for group in find_groups(make().eval(), images()[:1]).groups:
        if group.name in whole:
            assert not {part.target for part in group.slices} & left


@pytest.mark.parametrize("kind", MODELS)
def test_a_manifest_rebuilds_it_bit_for_bit(kind: str) -> None:
    make, whole = MODELS[kind]
    model, surgery = cut(make, whole)
    assert surgery.rolled_back == ()
    changes = json.loads(json.dumps(describe_changes(model, surgery.model)))
    fresh = make()
    apply_changes(fresh, changes)
    fresh.load_state_dict(surgery.model.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(images()), surgery.model(images()))
    assert describe_changes(surgery.model, fresh) == {"attributes": {}, "shapes": {}}
    again = apply(fresh, plan_without(find_groups(fresh, images()[:1]), ()), images()[:1]).model
    assert describe_changes(model, again)["branches"] == changes["branches"]


def test_copies_and_pickles_still_know_what_was_taken_out() -> None:
    _, surgery = cut(*MODELS["in place"])
    file = io.BytesIO()
    torch.save(surgery.model, file)
    file.seek(0)
    for other in (copy.deepcopy(surgery.model), torch.load(file, weights_only=False)):
        assert taken_out(other) == taken_out(surgery.model) != {}
        assert torch.equal(other(images()), surgery.model(images()))


def test_the_onnx_graph_does_not_run_the_branch(tmp_path: object) -> None:
    dense, surgery = cut(*MODELS["in place"], others=0.0)
    counts = []
    for name, model in (("dense", dense), ("small", surgery.model)):
        file = tmp_path / f"{name}.onnx"
        torch.onnx.export(model, (images(),), file, dynamo=True, verbose=False)
        counts.append(sum(node.op_type == "Conv" for node in onnx.load(file).graph.node))
    assert counts == [8, 4]


def test_it_trains_and_the_constant_learns() -> None:
    _, surgery = cut(*MODELS["in place"])
    surgery.model.train()(images()).square().sum().backward()
    for name in taken_out(surgery.model):
        assert surgery.model.get_parameter(name).grad.abs().sum() > 0


def test_the_constant_is_fitted_to_the_mean_of_the_dense_branch() -> None:
    model, surgery = cut(*MODELS["in place"])
    seen = []
    hook = model.blocks[0].bn2.register_forward_hook(lambda _, args, out: seen.append(out.detach().clone()))
    model(images())
    hook.remove()
    fit_branches(surgery.model, model, surgery.removed, images())
    mean = seen[0].mean((0, 2, 3))
    lost = surgery.removed["blocks.0.bn2", "norm", 0]
    kept = [i for i in range(len(mean)) if i not in lost]
    assert torch.allclose(surgery.model.blocks[0].branch_constant.flatten(), mean[kept], atol=1e-5)


def test_a_constant_whose_channels_are_counted_otherwise_stays_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model, surgery = cut(*MODELS["in place"])
    before = surgery.model.blocks[0].branch_constant.detach().clone()
    fit_branches(surgery.model, model, {}, images())
    assert torch.equal(surgery.model.blocks[0].branch_constant, before)
    assert "blocks.0.branch_constant: not fitted, since channels are counted" in capsys.readouterr().out


@pytest.mark.parametrize("block", [Multiplied, Padded, Dropping])
def test_what_is_not_added_or_differs_by_position_or_mode_is_no_branch(block: type[nn.Module]) -> None:
    model = randomised(Around(block())).eval()
    search = find_groups(model, images()[:1])
    group = next(g for g in search.groups if g.name == "block.body.0")
    with torch.no_grad():
        assert find_branch(model, group, images()) is None
    surgery = apply(model, plan_without(search, ("block.body.0",), 0.0), images()[:1])
    assert surgery.branches == () and "not those of a residual branch" in surgery.rolled_back[0].reason
    assert torch.equal(surgery.model(images()), model(images()))


OK = {"block": "blocks.0", "readers": ["conv2"], "channels": 8, "dims": 4, "dim": 1}


@pytest.mark.parametrize(
    "branch",
    [
        {**OK, "channels": 10**9},
        {**OK, "channels": -8},
        {**OK, "channels": 8.0},
        {**OK, "dims": 90},
        {**OK, "dim": 0},
        {**OK, "dim": 4},
        {**OK, "readers": []},
        {**OK, "readers": ["nothing"]},
        {**OK, "block": "nothing"},
        {**OK, "block": "", "readers": ["fc"]},
        {**OK, "block": "blocks.0.conv2", "readers": ["weight"]},
        "blocks.0",
    ],
)
def test_a_manifest_that_takes_out_what_is_no_branch_is_refused(branch: object) -> None:
    with pytest.raises(UsageError):
        apply_changes(Residuals(), {"attributes": {}, "shapes": {}, "branches": [branch]})
    with pytest.raises(UsageError):
        apply_changes(Residuals(), {"attributes": {}, "shapes": {}, "branches": branch})
    apply_changes(Residuals(), {"attributes": {}, "shapes": {}, "branches": [OK]})


def test_both_inner_groups_of_a_bottleneck_go_with_its_branch() -> None:
    make = partial(timm.create_model, "resnet26", num_classes=5)
    model, surgery = cut(make, ("layer1.1.conv1", "layer1.1.conv2", "layer3.1.conv1", "layer3.1.conv2"))
    assert surgery.rolled_back == () and len(surgery.branches) == 2
    assert {"layer1.1.conv1", "layer1.1.conv2"} <= {group.name for group in surgery.applied}
    fit_branches(surgery.model, model, surgery.removed, images())
    reconstruct(surgery.model, model, surgery.removed, images())


@pytest.mark.parametrize("kind", MODELS)
def test_least_squares_repairs_what_is_left_and_a_second_cut_follows(kind: str) -> None:
    make, whole = MODELS[kind]
    model, surgery = cut(make, whole)
    before = (surgery.model(images()) - model(images())).square().mean()
    fit_branches(surgery.model, model, surgery.removed, images())
    reconstruct(surgery.model, model, surgery.removed, images())
    assert (surgery.model.eval()(images()) - model(images())).square().mean() < before
    parent = copy.deepcopy(surgery.model)
    search = find_groups(parent, images()[:1])
    if kind == "attribute":  # tracing wrote the width into the code of its block
        assert search.groups == ()
        return
    again = apply(parent, plan_without(search, ()), images()[:1])
    assert again.rolled_back == () and len(again.branches) == len(whole)
    fit_branches(again.model, parent, again.removed, images())
    reconstruct(again.model, parent, again.removed, images())


def test_searching_every_group_for_a_branch_fails_on_none() -> None:
    others = (surgery_models.Grouped, surgery_models.Concat, surgery_models.Mlp, surgery_models.ResponseNorm, Normed)
    found = set()
    for make in (*others, *(make for make, _ in MODELS.values())):
        model = randomised(make()).eval()
        for group in find_groups(model, images()[:1]).groups:
            if find_branch(model, group, images()):
                found.add(make)
    assert found == {Normed, *(make for make, _ in MODELS.values())}


def test_a_group_that_is_wrong_in_train_mode_alone_is_left_out_beside_a_branch() -> None:
    model = randomised(OnlyInTraining()).eval()
    search = find_groups(model, images()[:1])
    without = apply(model, plan_without(search, ()), images()[:1])
    beside = apply(model, plan_without(search, ("blocks.0.conv1",)), images()[:1])
    assert {group.name for group in beside.rolled_back} == {group.name for group in without.rolled_back}
    assert len(beside.branches) == 1


def test_modes_hooks_and_flags_are_kept() -> None:
    model = randomised(Residuals()).train()
    model.blocks[0].shortcut.eval()
    model.requires_grad_(False)
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    take_out(model, Branch("blocks.0", ("conv2",), 8, 4, 1))
    assert model.blocks[0].training and not model.blocks[0].shortcut.training
    assert not model.blocks[0].branch_constant.requires_grad
    model(images())
    assert calls == [1]


def test_a_block_that_makes_tensors_keeps_its_branches_and_stays_as_it_was() -> None:
    model = Around(Made()).eval()
    with pytest.raises(UsageError, match="no parameter or buffer"):
        take_out(model, Branch("block", ("body.2",), 8, 4, 1))
    assert not [name for name in vars(model.block) if "constant" in name]


def test_two_branches_of_a_block_keep_the_attributes_that_each_trace_reads() -> None:
    _, surgery = cut(MODELS["transformer"][0], ("blocks.0.mlp.fc1", "blocks.0.attn.qkv"))
    assert {name for name in traced_attributes(surgery.model)} >= {"blocks.0", "blocks.0.mlp", "blocks.0.attn"}


def test_a_model_that_its_file_would_not_rebuild_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def otherwise(model: nn.Module, changes: dict[str, Any]) -> None:
        apply_changes(model, changes)
        model.register_forward_hook(lambda *call: call[2] + 1)

    opened = rp.load("demo")
    take_out(opened.module, Branch("backbone.layer1.1", ("conv2",), 32, 4, 1))
    artifact.save(tmp_path / "small.safetensors", opened.module, opened.spec)
    assert torch.equal(rp.load(tmp_path / "small.safetensors").module(images()), opened.module(images()))
    monkeypatch.setattr(artifact, "apply_changes", otherwise)
    with pytest.raises(UsageError, match="what a file would hold of this model"):
        artifact.save(tmp_path / "other.safetensors", opened.module, opened.spec)
    assert not (tmp_path / "other.safetensors").exists()
