from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from sensitivity_models import THREAT, by_name, loss_value, mean_loss, noise_set, settings
from torch import Tensor, nn
from torch.nn.utils import prune

from robust_prune.data.base import TensorImages
from robust_prune.errors import UsageError
from robust_prune.recipe import SensitivitySection
from robust_prune.sensitivity import estimators, losses
from robust_prune.sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from robust_prune.sensitivity.display import render_table
from robust_prune.sensitivity.estimators import ESTIMATORS, measure
from robust_prune.sensitivity.groups import aggregate_groups, tempered
from robust_prune.sensitivity.profile import SensitivityProfile
from robust_prune.sensitivity.targets import exchanged, find_targets
from robust_prune.serialization import from_json, to_json
from robust_prune.structure.types import ChannelGroup, GroupSlice


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4)).double()


@pytest.fixture
def mlp_adv() -> AdversarialSet:
    return noise_set((3, 2, 2), 4, count=20)


def snapshot(model: nn.Module) -> list[object]:
    state: list[object] = [(name, p, p.detach().clone(), p.requires_grad, p.grad) for name, p in
                           model.named_parameters()]  # fmt: skip
    state += [(name, b.clone()) for name, b in model.named_buffers()]
    for name, m in model.named_modules():
        hooks = [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
        state.append((name, m.training, sorted(m.__dict__), sorted(m._parameters), hooks))
    return state


def assert_same(before: list[object], after: list[object]) -> None:
    assert len(before) == len(after)
    for one, two in zip(before, after, strict=True):
        for a, b in zip(one, two, strict=True):  # type: ignore[call-overload]
            if isinstance(a, nn.Parameter):
                assert a is b
            elif isinstance(a, Tensor):
                assert torch.equal(a, b)
            else:
                assert a == b


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_model_is_left_as_it_came(resnet: nn.Module, adv: AdversarialSet, estimator: str) -> None:
    resnet.train()
    resnet.layer1[0].bn1.eval()
    resnet.stem[0].weight.requires_grad_(False)
    mean_loss(resnet, adv).backward()
    before = snapshot(resnet)
    with torch.no_grad():
        measure(resnet, adv, settings(estimator=estimator, ascent_steps=2))
    assert_same(before, snapshot(resnet))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("after", [0, 1, 5, 20])
def test_model_survives_an_exception(
    resnet: nn.Module, adv: AdversarialSet, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(resnet)
    plain: Callable[..., Tensor] = F.cross_entropy
    calls = 0

    def failing(*args: Tensor, **kwargs: str) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(losses.F, "cross_entropy", failing)
    with pytest.raises(KeyboardInterrupt):
        measure(resnet, adv)
    assert_same(before, snapshot(resnet))


def test_an_exception_inside_the_model_restores_forwards(resnet: nn.Module, adv: AdversarialSet) -> None:
    before = snapshot(resnet)
    wrong = AdversarialSet(torch.rand(2, 4, 8, 8), torch.tensor([0, 1]), THREAT, 0)
    with pytest.raises(RuntimeError):
        measure(resnet, wrong)
    assert_same(before, snapshot(resnet))


def test_deterministic(resnet: nn.Module, adv: AdversarialSet) -> None:
    assert measure(resnet, adv) == measure(resnet, adv)


def test_parts_represent_the_set_in_whatever_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 4)).requires_grad_(False)
    images, labels = torch.rand(200, 3, 4, 4), torch.randint(4, (200,))
    whole = F.cross_entropy(model(images), labels, reduction="none")
    order = torch.randperm(200)
    found = []
    for chosen in (torch.arange(200), order):
        adv = AdversarialSet(images[chosen], labels[chosen], THREAT, 0)
        found.append(losses.RobustLoss(model, adv, 64, torch.device("cpu")).stratified().part(20))
    part, other = (loss.adv for loss in found)
    assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)
    counts = torch.bincount(part.labels, minlength=4) - torch.bincount(labels, minlength=4) / 10
    assert counts.abs().max() <= 1
    mine = F.cross_entropy(model(part.images), part.labels, reduction="none")
    assert mine.mean().item() == pytest.approx(whole.mean().item(), rel=0.02)
    assert mine.std().item() == pytest.approx(whole.std().item(), rel=0.1)


def test_images_in_another_order_give_the_same(resnet: nn.Module, adv: AdversarialSet) -> None:
    flipped = AdversarialSet(adv.images.flip(0), adv.labels.flip(0), THREAT, adv.seed)
    resnet.double()  # so that sums in another order agree
    there, back = (by_name(measure(resnet, found, radii=())) for found in (adv, flipped))
    assert there == pytest.approx(back, rel=1e-9, abs=1e-12)


def test_modules_in_order_of_execution(resnet: nn.Module, adv: AdversarialSet) -> None:
    names = [module.name for module in measure(resnet, adv, settings(estimator="gradient")).modules]
    assert names[:2] == ["stem.0", "layer1.0.conv1"]
    assert names[-5:] == ["functional", "attention", "attention.out_proj", "head", "unused"]


def test_json_round_trip(resnet: nn.Module, adv: AdversarialSet) -> None:
    profile = measure(resnet, adv, groups=[group("a", "stem.0", "layer1.0.conv2")])
    assert from_json(SensitivityProfile, json.loads(json.dumps(to_json(profile)))) == profile
    assert profile.rho in profile.radii and list(profile.radii) == sorted(profile.radii)


def group(name: str, *producers: str) -> ChannelGroup:
    parts = tuple(GroupSlice(p, "out", tuple(range(6)), tuple(range(6))) for p in producers)
    return ChannelGroup(name, 6, parts)


def test_group_aggregations(resnet: nn.Module, adv: AdversarialSet) -> None:
    profile = measure(resnet, adv, groups=[group("g", "stem.0", "layer1.0.conv2")])
    a, b = by_name(profile)["stem.0"], by_name(profile)["layer1.0.conv2"]
    expected = {"sum": a + b, "max": max(a, b), "mean": (a + b) / 2, "quadrature": (a * a + b * b) ** 0.5}
    assert profile.aggregation == "sum" and profile.groups[0].mrs == pytest.approx(a + b)
    for rule, value in expected.items():
        again = aggregate_groups(profile, [group("g", "stem.0", "layer1.0.conv2")], rule)
        assert again.groups[0].mrs == pytest.approx(value)
        assert again.groups[0].curve[again.radii.index(0.1)] == pytest.approx(value)
    with pytest.raises(UsageError, match="none of which"):
        aggregate_groups(profile, [group("g", "absent")])
    with pytest.raises(UsageError, match="aggregation must be one of"):
        aggregate_groups(profile, [], "median")


def test_damping_counts_a_group_once_a_producer(resnet: nn.Module, adv: AdversarialSet) -> None:
    pair = group("pair", "stem.0", "layer1.0.conv2")
    profile = measure(resnet, adv, groups=[pair])
    a, b = (next(m for m in profile.modules if m.name == name) for name in pair.producers)
    half = tempered(profile, [pair], 0.5)
    assert half.groups[0].mrs == pytest.approx(a.mrs**0.5 + b.mrs**0.5)
    assert half.groups[0].curve[-1] == pytest.approx(a.curve[-1] ** 0.5 + b.curve[-1] ** 0.5)
    assert tempered(profile, [pair], 1.0) == profile
    assert tempered(profile, [pair], 0.0).groups[0].curve == (2.0,) * len(profile.radii)


def test_sum_is_the_joint_first_order_rise(mlp: nn.Module, mlp_adv: AdversarialSet) -> None:
    rho = 1e-5
    profile = measure(mlp, mlp_adv, settings(estimator="gradient", rho=rho), radii=(), groups=[group("g", "1", "3")])
    mlp.zero_grad()
    base = mean_loss(mlp, mlp_adv, torch.float64)
    base.backward()
    with torch.no_grad():
        for layer in (mlp[1], mlp[3]):
            layer.weight += rho * layer.weight.norm() * layer.weight.grad / layer.weight.grad.norm()
        rise = loss_value(mlp, mlp_adv, torch.float64) - base.item()
    assert profile.groups[0].mrs == pytest.approx(rise, rel=1e-3)


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


def test_adversarial_set(resnet: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = TensorImages(pixels, torch.randint(5, (30,), generator=generator))
    resnet.train()
    before = snapshot(resnet)
    few = SensitivitySection(images=16, steps=5)
    made = make_adversarial_set(resnet, images, THREAT, few, batch_size=6, seed=3)
    assert_same(before, snapshot(resnet))
    again = make_adversarial_set(resnet, images, THREAT, few, batch_size=6, seed=3)
    other = make_adversarial_set(resnet, images, THREAT, few, batch_size=6, seed=4)
    assert torch.equal(made.images, again.images) and not torch.equal(made.images, other.images)
    assert made.images.dtype == torch.float32 and made.labels.dtype == torch.int64 and len(made) == 16
    assert made.images.min() >= 0 and made.images.max() <= 1
    clean = pixels.float() / 255
    distance = (made.images.unsqueeze(1) - clean.unsqueeze(0)).abs().flatten(2).amax(2)
    nearest, source = distance.min(1)
    assert nearest.max() <= 8 / 255 + 1e-6 and len(source.unique()) == 16
    assert torch.equal(images.labels[source], made.labels)
    resnet.eval()
    attacked = loss_value(resnet, made)
    assert attacked > loss_value(resnet, AdversarialSet(clean[source], made.labels, THREAT, 0))


def test_adversarial_set_refuses_nonsense(resnet: nn.Module) -> None:
    empty = TensorImages(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UsageError, match="needs training images"):
        make_adversarial_set(resnet, empty, THREAT)
    with pytest.raises(UsageError, match="batch_size of the adversarial set must be at least 1, got 0"):
        make_adversarial_set(resnet, empty, THREAT, batch_size=0)
    with pytest.raises(UsageError, match="one label an image"):
        AdversarialSet(torch.zeros(2, 3, 8, 8), torch.zeros(1, dtype=torch.int64), THREAT, 0)


def test_default_radii_contain_the_default_rho() -> None:
    assert 0.1 in estimators.DEFAULT_RADII


def test_the_table_ranks_modules(resnet: nn.Module, adv: AdversarialSet) -> None:
    profile = measure(resnet, adv, settings(estimator="gradient"))
    console = Console(record=True, width=140, quiet=False, file=io.StringIO())
    console.print(render_table(profile))
    text = console.export_text()
    top = max(profile.modules, key=lambda m: m.mrs)
    row = next(line for line in text.splitlines() if f" {top.name} " in line)
    assert "█" * 16 in row and f"{top.mrs:.3g}" in row
    assert next(line for line in text.splitlines() if " unused " in line).count("█") == 0
