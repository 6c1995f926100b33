"""The repair that a recipe asks for is the one that is made, on the images that it says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders.evaluation_sample import generated
from builders.surgery_models import Residual, example, plan_of
from builders.weights import randomised
from torch import nn

from robust_prune.attacks import ThreatModel
from robust_prune.data.base import random_images
from robust_prune.recipe import Recipe
from robust_prune.recipe_reader import load
from robust_prune.sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from robust_prune.structure.groups import find_groups
from robust_prune.surgery import repair as module
from robust_prune.surgery.apply import Surgery, apply
from robust_prune.surgery.repair import repair

IMAGES = generated(60)


@pytest.fixture
def dense() -> nn.Module:
    return randomised(Residual())


@pytest.fixture
def surgery(dense: nn.Module) -> Surgery:
    return apply(dense, plan_of(find_groups(dense, example()), 0.3), example())


def recipe_of(method: str, **values: Any) -> Recipe:
    few = {"pruning.repair_images": 24, "sensitivity.steps": 2, "sensitivity.images": 7, "seed": 3}
    return load(None, {**few, "pruning.repair": method, **values})


def distance(one: nn.Module, other: nn.Module) -> float:
    x = generated(64, seed=5).images.float() / 255
    with torch.no_grad():
        return float((one.eval()(x) - other.eval()(x)).square().mean())


def test_least_squares_brings_the_outputs_back_and_leaves_the_dense_model(dense: nn.Module, surgery: Surgery) -> None:
    before, state = distance(surgery.model, dense), copy.deepcopy(dense.state_dict())
    repair(surgery, dense, IMAGES, recipe_of("least_squares"), "cpu")
    assert distance(surgery.model, dense) < before / 2
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in state.items())


def test_batch_norm_is_estimated_from_the_cut_models_own_activations(dense: nn.Module, surgery: Surgery) -> None:
    weights = {name: value.clone() for name, value in surgery.model.named_parameters()}
    repair(surgery, dense, IMAGES, recipe_of("batchnorm", **{"pruning.repair_images": 60}), "cpu")
    with torch.no_grad():
        found = surgery.model.stem(IMAGES.images.float() / 255).mean((0, 2, 3))
    torch.testing.assert_close(surgery.model.bn0.running_mean, found, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in surgery.model.named_parameters())


def test_none_leaves_the_cut_as_it_is(dense: nn.Module, surgery: Surgery) -> None:
    state = copy.deepcopy(surgery.model.state_dict())
    repair(surgery, dense, IMAGES, recipe_of("none"), "cpu")
    assert all(torch.equal(value, state[name]) for name, value in surgery.model.state_dict().items())


def test_least_squares_reads_as_many_clean_as_attacked_images(
    dense: nn.Module, surgery: Surgery, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "reconstruct", lambda *arguments, **_: asked.append(arguments))
    recipe = recipe_of("least_squares", **{"threat.epsilon": 0.1})
    repair(surgery, dense, IMAGES, recipe, "cpu")
    ((small, whole, removed, images),) = asked
    assert small is surgery.model and whole is dense and removed == surgery.removed
    clean, _ = random_images(IMAGES, 24, 3)
    section = recipe.sensitivity.model_copy(update={"images": 24})
    attacked = make_adversarial_set(dense, IMAGES, ThreatModel("linf", 0.1), section, seed=3)
    assert torch.equal(images, torch.cat([clean, attacked.images]))


def test_there_are_no_more_images_than_there_are_and_a_set_that_is_given_is_not_made_anew(
    dense: nn.Module, surgery: Surgery, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "reconstruct", lambda *arguments, **_: asked.append(arguments[-1]))
    monkeypatch.setattr(module, "make_adversarial_set", lambda *_, **__: pytest.fail("made anew"))
    adv = AdversarialSet(torch.rand(5, 3, 8, 8), torch.zeros(5, dtype=torch.long), ThreatModel(), 0)
    repair(surgery, dense, IMAGES, recipe_of("least_squares", **{"pruning.repair_images": 512}), "cpu", adv)
    (images,) = asked
    assert len(images) == 60 + 5 and torch.equal(images[60:], adv.images)
