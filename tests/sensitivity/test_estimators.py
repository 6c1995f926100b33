"""Estimators of MRS: against the analytic value, against each other, and at their limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from builders.sensitivity_models import THREAT, by_name, group, loss_value, mean_loss, noise_set, settings
from torch import Tensor, nn
from torch.nn.utils import prune

from robust_prune.data.base import TensorImages
from robust_prune.errors import UsageError
from robust_prune.recipe import SensitivitySection
from robust_prune.runs import parts as storing
from robust_prune.runs.cache import Cache
from robust_prune.sensitivity import estimators
from robust_prune.sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from robust_prune.sensitivity.estimators import ESTIMATORS, measure
from robust_prune.sensitivity.profile import SensitivityProfile
from robust_prune.sensitivity.targets import exchanged, find_targets
from robust_prune.serialization import from_json, to_json
from robust_prune.structure.types import ChannelGroup, GroupSlice


def test_gradient_is_the_analytic_derivative(mlp: nn.Module, mlp_adv: AdversarialSet) -> None:
    profile = measure(mlp, mlp_adv, settings(estimator="gradient", rho=0.1), radii=(0.2,), batch_size=7)
    mlp.zero_grad()
    mean_loss(mlp, mlp_adv, torch.float64).backward()
    for module in profile.modules:
        weight = mlp.get_submodule(module.name).weight
        assert module.mrs == pytest.approx(0.1 * float(weight.detach().norm() * weight.grad.norm()), rel=1e-9)
        assert module.curve == pytest.approx((module.mrs, 2 * module.mrs))
    assert profile.base_loss == pytest.approx(loss_value(mlp, mlp_adv, torch.float64), rel=1e-9)


def test_gradient_is_the_limit_of_boundary(mlp: nn.Module, mlp_adv: AdversarialSet) -> None:
    slope = by_name(measure(mlp, mlp_adv, settings(estimator="gradient", rho=1e-5), radii=()))
    real = by_name(measure(mlp, mlp_adv, settings(estimator="boundary", rho=1e-5), radii=()))
    assert real == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("rho", [0.1, 0.5])
def test_ascent_finds_the_analytic_maximum(rho: float) -> None:
    # Two classes and one input direction a: the loss falls with the margin, so the best perturbation of the first
    # layer lowers it along v = W2ᵀ(e_y − e_other), by ‖v‖‖a‖ρ‖W1‖: softplus is monotone, hence a closed form.
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)).double()
    adv = AdversarialSet(torch.rand(1, 1, 2, 2), torch.tensor([1]), THREAT, 0)
    first, second = model[1].weight.detach(), model[2].weight.detach()
    a = adv.images.double().flatten()
    v = second[1] - second[0]
    margin = v @ first @ a
    best = {
        "1": F.softplus(-(margin - rho * first.norm() * v.norm() * a.norm())),
        "2": F.softplus(-(margin - rho * second.norm() * (first @ a).norm() * 2**0.5)),
    }
    found = by_name(measure(model, adv, settings(estimator="ascent", rho=rho), radii=()))
    for name, value in best.items():
        assert found[name] == pytest.approx(float(value - F.softplus(-margin)), rel=1e-5)


def test_ascent_reaches_brute_force(mlp: nn.Module, mlp_adv: AdversarialSet) -> None:
    rho = 0.5
    found = by_name(measure(mlp, mlp_adv, settings(estimator="ascent", rho=rho, ascent_steps=40), radii=()))
    generator = torch.Generator().manual_seed(0)
    for target in find_targets(mlp):
        radius = rho * target.weight.detach().norm()
        best = 0.0
        base = loss_value(mlp, mlp_adv, torch.float64)
        for _ in range(6):
            delta = torch.randn(target.weight.shape, generator=generator, dtype=torch.float64)
            delta = delta * radius / delta.norm()
            for _ in range(120):
                with exchanged(target, (target.weight.detach() + delta).requires_grad_(True)) as weight:
                    (slope,) = torch.autograd.grad(mean_loss(mlp, mlp_adv, torch.float64), weight)
                delta = delta + 0.3 * radius * slope / slope.norm()
                delta = delta * min(1.0, float(radius / delta.norm()))
            with exchanged(target, target.weight + delta):
                best = max(best, loss_value(mlp, mlp_adv, torch.float64) - base)
        assert found[target.name] == pytest.approx(best, rel=5e-3)


def test_estimators_are_ordered(resnet: nn.Module, adv: AdversarialSet) -> None:
    boundary = measure(resnet, adv, settings(estimator="boundary"))
    ascent = measure(resnet, adv, settings(estimator="ascent"))
    for low, high in zip(boundary.modules, ascent.modules, strict=True):
        assert low.name == high.name
        assert high.mrs >= low.mrs - 1e-4  # the search runs in bf16 where the hardware has it
        assert list(high.curve) == sorted(high.curve) and list(low.curve) == sorted(low.curve)
        assert min(low.curve) >= 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_invariant_under_rescaling(mlp: nn.Module, mlp_adv: AdversarialSet, estimator: str) -> None:
    before = measure(mlp, mlp_adv, settings(estimator=estimator))
    with torch.no_grad():
        mlp[1].weight *= 7.0
        mlp[1].bias *= 7.0
        mlp[3].weight /= 7.0
    after = measure(mlp, mlp_adv, settings(estimator=estimator))
    assert after.modules[0].weight_norm == pytest.approx(7 * before.modules[0].weight_norm)
    for one, two in zip(before.modules, after.modules, strict=True):
        assert two.curve == pytest.approx(one.curve, rel=1e-6)
        assert one.mrs > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_that_ignores_its_weights_has_no_sensitivity(adv: AdversarialSet, estimator: str) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mean((2, 3))) * 0

    found = by_name(measure(Constant(), adv, settings(estimator=estimator)))
    assert found == {"layer": 0.0}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unused_module_has_no_sensitivity(resnet: nn.Module, adv: AdversarialSet, estimator: str) -> None:
    profile = measure(resnet, adv, settings(estimator=estimator, ascent_steps=2))
    assert profile.modules[-1].name == "unused"
    assert profile.modules[-1].curve == (0.0,) * len(profile.radii)
    assert all(module.mrs > 0 for module in profile.modules[:-1])
    assert "attention" in by_name(profile) and "attention.out_proj" in by_name(profile)


def test_deterministic(resnet: nn.Module, adv: AdversarialSet) -> None:
    assert measure(resnet, adv) == measure(resnet, adv)


def test_modules_in_order_of_execution(resnet: nn.Module, adv: AdversarialSet) -> None:
    names = [module.name for module in measure(resnet, adv, settings(estimator="gradient")).modules]
    assert names[:2] == ["stem.0", "layer1.0.conv1"]
    assert names[-5:] == ["functional", "attention", "attention.out_proj", "head", "unused"]


def test_json_round_trip(resnet: nn.Module, adv: AdversarialSet) -> None:
    profile = measure(resnet, adv, groups=[group("a", "stem.0", "layer1.0.conv2")])
    assert from_json(SensitivityProfile, json.loads(json.dumps(to_json(profile)))) == profile
    assert profile.rho in profile.radii and list(profile.radii) == sorted(profile.radii)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_non_finite_loss_is_a_clear_error(resnet: nn.Module, adv: AdversarialSet, estimator: str) -> None:
    resnet.layer2[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match="robust loss is nan at the given weights"):
        measure(resnet, adv, settings(estimator=estimator))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radii": (0.1, float("inf"))}, "radii must be finite and > 0"),
        ({"radii": (0.0,)}, "radii must be finite and > 0"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_arguments(resnet: nn.Module, adv: AdversarialSet, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure(resnet, adv, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"estimator": "hessian"},
            r"sensitivity\.estimator must be one of 'gradient', 'boundary' or 'ascent', got 'hessian'",
        ),
        ({"rho": 0.0}, r"sensitivity\.rho: input should be greater than 0"),
        ({"ascent_steps": 0}, r"sensitivity\.ascent_steps: input should be greater than or equal to 1"),
        ({"aggregation": "median"}, r"sensitivity\.aggregation must be one of 'sum', .*, got 'median'"),
    ],
)
def test_bad_settings(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(**values)


def test_models_that_cannot_be_measured(adv: AdversarialSet) -> None:
    with pytest.raises(UsageError, match="no convolution, linear or attention"):
        measure(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), adv)
    normed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 5)))
    with pytest.raises(UsageError, match="remove_parametrizations"):
        measure(normed, adv)
    spectral = nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(192, 5)))
    with pytest.raises(UsageError, match=r"spectral norm: torch\.nn\.utils\.remove_spectral_norm"):
        measure(spectral, adv)
    masked = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    prune.l1_unstructured(masked[1], "weight", 0.5)
    with pytest.raises(UsageError, match=r"'1' is computed from others.*torch\.nn\.utils\.prune\.remove"):
        measure(masked, adv)


def test_wrapped_and_double_models(resnet: nn.Module, adv: AdversarialSet) -> None:
    groups = [ChannelGroup("shared", 6, (GroupSlice("shared", "out", tuple(range(6)), tuple(range(6))),))]
    plain = measure(resnet, adv, groups=groups)
    for wrapped in (nn.DataParallel(resnet), torch.compile(resnet, backend="eager")):
        assert measure(wrapped, adv, groups=groups) == plain
    images = TensorImages((adv.images * 255).byte(), adv.labels)
    made = make_adversarial_set(resnet.double(), images, THREAT, SensitivitySection(steps=2))
    assert made.images.dtype == torch.float32


def test_gradient_checkpointing_is_put_aside() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    adv = noise_set((3, 32, 32), 5, count=2)
    plain = measure(model, adv)
    model.set_grad_checkpointing(True)
    assert measure(model, adv) == plain
    assert model.grad_checkpointing


def test_default_radii_contain_the_default_rho() -> None:
    assert 0.1 in estimators.DEFAULT_RADII


@pytest.mark.parametrize("estimator", ["boundary", "ascent"])
def test_a_killed_measurement_goes_on_and_ends_alike_wherever_it_was_killed(
    estimator: str, resnet: nn.Module, adv: AdversarialSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = settings(estimator=estimator, ascent_steps=2)
    wanted = measure(resnet, adv, section, batch_size=4)
    store, put = Cache(tmp_path), Cache.store
    left = 0

    def counted(cache: Cache, *arguments: Any) -> None:
        nonlocal left
        put(cache, *arguments)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Cache, "store", counted)
    monkeypatch.setattr(storing, "WORK_FOR_WRITING", 0.0)
    times = 0
    for _ in range(500):
        left = 3  # parts that each process completes before it is killed
        try:
            with storing.parts(store, "Sensitivity", [estimator]) as parts:
                found = measure(resnet, adv, section, batch_size=4, parts=parts)
            break
        except KeyboardInterrupt:
            times += 1
    assert found == wanted and times > 10
    assert store.entries() == []
