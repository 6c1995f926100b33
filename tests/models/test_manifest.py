"""What a manifest says of a cut rebuilds it."""

from __future__ import annotations

import json

import pytest
import torch
from builders.surgery_models import (
    MODELS,
    Residual,
    example,
    images,
    plan_of,
)
from builders.weights import randomised

from robust_prune.errors import UsageError
from robust_prune.models.manifest import apply_changes, describe_changes
from robust_prune.structure.groups import find_groups
from robust_prune.surgery.apply import apply


@pytest.mark.parametrize("name", ["residual", "grouped", "wide_resnet", "vit"])
def test_the_manifest_rebuilds_a_pruned_model_bit_for_bit(name: str) -> None:
    model = randomised(MODELS[name]())
    small = apply(model, plan_of(find_groups(model, example())), example()).model
    changes = json.loads(json.dumps(describe_changes(model, small)))
    fresh = MODELS[name]()
    apply_changes(fresh, changes)
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(images()), small(images()))
    assert describe_changes(small, fresh) == {"attributes": {}, "shapes": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {"attributes": {"nothing": {"width": 1}}, "shapes": {}},
        {"attributes": {"stem": {"nothing": 1}}, "shapes": {}},
        {"attributes": {"stem": {"training": False}}, "shapes": {}},
        {"attributes": {"stem": {"kernel_size": 3}}, "shapes": {}},
        {"attributes": {}, "shapes": {"nothing.weight": [1]}},
        {"attributes": {}, "shapes": {"stem.weight": [10**9, 3, 3, 3]}},
        {"attributes": {}, "shapes": {"stem.weight": [12]}},
        {"attributes": {"stem": {"out_channels": 6}}},
        {"attributes": {"stem": {"out_channels": 6}}, "shapes": {"stem.weight": "no"}},
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_and_changes_nothing(changes: dict) -> None:
    model = Residual()
    with pytest.raises(UsageError):
        apply_changes(model, changes)
    assert describe_changes(Residual(), model) == {"attributes": {}, "shapes": {}}
