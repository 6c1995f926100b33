"""Residual branches without channels are taken out: exactly, physically, and so that a file rebuilds the model."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Collection

import onnx
import pytest
import torch
from builders.branch_models import MODELS, Around, Dropping, Multiplied, Padded, Residuals, images
from builders.weights import randomised
from torch import nn

from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.errors import UsageError
from robust_prune.models.branches import taken_out
from robust_prune.models.manifest import apply_changes, describe_changes
from robust_prune.structure.branches import find_branch
from robust_prune.structure.groups import GroupSearch, find_groups
from robust_prune.surgery.apply import Surgery, apply
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


@pytest.mark.parametrize(
    "branch",
    [
        {"block": "blocks.0", "readers": ["conv2"], "shape": [1, 10**9, 1, 1]},
        {"block": "blocks.0", "readers": ["conv2"], "shape": [1, -8, 1, 1]},
        {"block": "blocks.0", "readers": [], "shape": [1, 8, 1, 1]},
        {"block": "blocks.0", "readers": ["nothing"], "shape": [1, 8, 1, 1]},
        {"block": "nothing", "readers": ["conv2"], "shape": [1, 8, 1, 1]},
        {"block": "", "readers": ["fc"], "shape": [1, 8, 1, 1]},
        {"block": "blocks.0.conv2", "readers": ["weight"], "shape": [1, 8, 1, 1]},
        "blocks.0",
    ],
)
def test_a_manifest_that_takes_out_what_is_no_branch_is_refused(branch: object) -> None:
    with pytest.raises(UsageError):
        apply_changes(Residuals(), {"attributes": {}, "shapes": {}, "branches": [branch]})
    with pytest.raises(UsageError):
        apply_changes(Residuals(), {"attributes": {}, "shapes": {}, "branches": branch})
