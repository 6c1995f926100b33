"""A cut that only the model's own weights spoil is left out, and the others are kept."""

from __future__ import annotations

import torch
from builders.branches import WeightSwitch, pictures
from builders.surgery_models import plan_of

from robust_prune.structure.groups import find_groups
from robust_prune.surgery.apply import apply

EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_a_cut_that_fails_with_the_models_own_weights_is_rolled_back_alone() -> None:
    model = WeightSwitch()
    plan = plan_of(find_groups(model, EXAMPLE, pictures()))
    assert [group.name for group in plan.groups] == ["stem.0", "body.0"]
    done = apply(model, plan, EXAMPLE, pictures())
    assert [group.name for group in done.applied] == ["body.0"]
    (left,) = done.rolled_back
    assert left.name == "stem.0" and "the cut model fails" in left.reason
    assert done.model.stem[0].out_channels == 12 and done.model.body[0].out_channels == 8
    assert done.model.eval()(pictures()).shape == (16, 3)
