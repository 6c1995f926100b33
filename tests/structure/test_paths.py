"""Branches that only training runs, or only some images take, are found, cut along, and proved."""

from __future__ import annotations

import pytest
import torch
from builders.branches import DarkAndLight, EarlyExit, FixedOrder, NoisyTraining, Plain, SideHead, TwoNorms, pictures
from builders.surgery_models import plan_of
from torch import nn

from robust_prune.errors import UsageError
from robust_prune.structure.groups import find_groups
from robust_prune.structure.paths import find_paths, used_names
from robust_prune.surgery.apply import apply

EXAMPLE = torch.zeros(1, 3, 8, 8)


def trains(model: nn.Module) -> bool:
    model.train()
    model(pictures()).square().sum().backward()
    return all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "follows"),
    [
        (SideHead, ("side.0", "in")), (NoisyTraining, ("level", "param")), (TwoNorms, ("norms.1", "norm")),
        (DarkAndLight, ("dark", "in")), (EarlyExit, ("body.0", "in")),
    ],
)  # fmt: skip
def test_what_one_pass_does_not_show_follows_the_cut(kind: type[nn.Module], follows: tuple[str, str]) -> None:
    model = kind()
    search = find_groups(model, EXAMPLE, pictures())
    stem = next(group for group in search.groups if group.name == "stem.0")
    assert follows in {(part.target, part.side) for part in stem.slices}
    done = apply(model, plan_of(search), EXAMPLE, pictures())
    assert done.rolled_back == () and done.model.stem[0].out_channels == 6
    assert trains(done.model)
    assert done.model.eval()(pictures()).shape == (16, 3)


def test_layers_that_only_training_or_only_some_images_run_are_not_cut_themselves() -> None:
    search = find_groups(SideHead(), EXAMPLE, pictures())
    assert {r.name: r.reason for r in search.skipped} == {"side.0": "only training runs it"}


def test_a_group_that_breaks_training_alone_is_left_whole_with_the_reason() -> None:
    model = FixedOrder()
    search = find_groups(model, EXAMPLE, pictures())
    assert [group.name for group in search.groups] == ["body.0"]
    assert [r.name for r in search.skipped] in ([], ["stem.0"])
    assert trains(apply(model, plan_of(search), EXAMPLE, pictures()).model)


def test_paths_name_what_is_not_always_run_and_cost_nothing_where_nothing_is_hidden() -> None:
    found = find_paths(SideHead(), pictures(), used_names(SideHead(), pictures(2)))
    assert found.reasons == {"side.0": "only training runs it", "side.3": "only training runs it"}
    assert [step.training for step in found.hidden] == [True] and found.unused == ()
    some = find_paths(DarkAndLight(), pictures(), ())
    assert some.reasons == dict.fromkeys(["dark", "light"], "only some images take it")
    plain = Plain()
    assert find_paths(plain, pictures(), used_names(plain, pictures(2))).hidden == ()
    plain.spare = nn.Linear(2, 2)
    assert find_paths(plain, pictures(), ()).unused == ("spare",)


def test_looking_changes_nothing() -> None:
    model = TwoNorms().train()
    model.head.eval()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    find_paths(model, pictures(), ())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and not model.head.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_trained_is_refused() -> None:
    class Stubborn(Plain):
        def between(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("not in training")
            return x

    with pytest.raises(UsageError, match=r"runs in train mode .* not in training"):
        find_groups(Stubborn(), EXAMPLE)
