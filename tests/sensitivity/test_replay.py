"""Forward passes that skip what cannot have changed: exact, and as few as promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders.sensitivity_models import THREAT, by_name, noise_set, plain_boundary, settings
from torch import Tensor, nn

from robust_prune.sensitivity import ascent, estimators, initial_directions, replay
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.sensitivity.estimators import measure
from robust_prune.sensitivity.losses import RobustLoss
from robust_prune.sensitivity.recordings import Recordings, bounded, bytes_an_image
from robust_prune.sensitivity.search import SearchBudget
from robust_prune.sensitivity.targets import exchanged, find_targets


@pytest.fixture
def no_plateau(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascent, "PLATEAU_STEPS", 99)


def test_prefix_reuse_changes_nothing(resnet: nn.Module, adv: AdversarialSet, no_plateau: None) -> None:
    resnet.double()
    profile = measure(resnet, adv, settings(rho=0.1), radii=(0.3,), batch_size=5)
    expected = plain_boundary(resnet, adv, 0.1, (0.1, 0.3))
    for module in profile.modules:
        assert module.curve == pytest.approx(expected[module.name], rel=1e-6, abs=1e-12), module.name


def test_every_weight_replays_exactly(resnet: nn.Module, adv: AdversarialSet) -> None:
    resnet.eval()
    targets = find_targets(resnet)
    trace = replay.trace_calls(resnet, adv.images[:2], [t.weight for t in targets])
    frontiers = {t.name: trace.frontier(t.weight) for t in targets}
    recording = replay.record(resnet, trace, adv.images, frozenset().union(*frontiers.values()))[1]
    for target in targets:
        with torch.no_grad(), exchanged(target, target.weight * 1.5 + 0.1):
            expected = resnet(adv.images)
            for _ in range(2):  # a replay that spoiled the recording would show in the second
                found = replay.replay(resnet, trace, adv.images, recording, frontiers[target.name])
                assert torch.equal(found, expected), target.name
    assert not frontiers["stem.0"] and frontiers["functional"]
    assert resnet.layer1 in [trace.calls[i].module for i in frontiers["shared"]]


class Counter:
    """Counts images through convolutions, by shape of the work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        plain = nn.Conv2d._conv_forward

        def counted(module: nn.Conv2d, *args: Tensor) -> Tensor:
            self.calls += 1
            return plain(module, *args)

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)


def chain(depth: int) -> nn.Module:
    torch.manual_seed(0)
    convs = [layer for _ in range(depth) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_prefix_reuse_saves_convolutions(monkeypatch: pytest.MonkeyPatch, no_plateau: None) -> None:
    model, adv = chain(6).double(), noise_set((3, 8, 8), 3, count=8)
    counter = Counter(monkeypatch)
    short = SearchBudget(initial_images=8, initial_directions=1, compare_images=8, compare_steps=2, images=8, steps=3)
    monkeypatch.setattr(estimators, "SHORT", short)
    monkeypatch.setattr(estimators, "LONG", short)
    measure(model, adv, settings(rho=0.1), radii=(), batch_size=4)
    # Try the layout, trace, weigh a recording and what two backward passes keep; per batch the losses that order the
    # images, and a gradient pass. The search: the likely classes, joint climbs along the gradient and towards each of
    # three classes with a step of each layer; the base for either later stage; each of the three stages weighs and
    # makes one recording, then each layer runs what follows it. At last a recording and what lies behind each layer.
    whole, behind, joint = 2 * 6, 2 * 21, initial_directions.JOINT_STEPS
    begun = whole + (joint + 3 * (1 + joint)) * whole + 4 * behind
    search = begun + 2 * whole + 3 * (6 + whole) + (2 + 3) * behind
    assert counter.calls == 5 * 6 + 2 * whole + search + whole + behind
    counter.calls = 0
    measure(model, adv, settings(rho=0.1, estimator="ascent", ascent_steps=3), radii=(), batch_size=4)
    # The short search, the long one, whose second stage climbs from where the short one arrived as well, the whole set.
    both = search + (search + 3 * behind) + (whole + 6 + whole + 3 * behind)
    assert counter.calls == 5 * 6 + 2 * whole + both + whole + behind


class Viewing(nn.Module):
    """Refuses channels_last features."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.flatten = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 3), flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.conv(x).relu()))


def test_models_that_refuse_channels_last_get_contiguous_images() -> None:
    adv = noise_set((3, 8, 8), 3, count=8)
    viewing, reshaping = Viewing(lambda h: h.view(len(h), -1)), Viewing(lambda h: h.reshape(len(h), -1))
    with pytest.raises(RuntimeError, match="view size"):
        viewing(adv.images.contiguous(memory_format=torch.channels_last))
    found, wanted = (by_name(measure(model, adv)) for model in (viewing, reshaping))
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
def test_less_memory_makes_smaller_batches_and_the_same_values(
    resnet: nn.Module, adv: AdversarialSet, estimator: str
) -> None:
    images = []
    hook = resnet.stem[0].register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    resnet.double()
    plenty = by_name(measure(resnet, adv, settings(estimator=estimator, ascent_steps=2)))
    assert max(images) == len(adv)
    images.clear()
    none = by_name(measure(resnet, adv, settings(estimator=estimator, ascent_steps=2), memory_bytes=0))
    assert max(images) == estimators.TRACE_IMAGES and images.count(1) >= len(adv)
    hook.remove()
    assert none == pytest.approx(plenty, rel=1e-4, abs=1e-9)


def test_recordings_keep_to_their_limit(resnet: nn.Module, adv: AdversarialSet) -> None:
    resnet.eval()
    loss = RobustLoss(resnet, adv, 3, torch.device("cpu"))
    weights = [t.weight for t in find_targets(resnet)]
    trace = replay.trace_calls(resnet, adv.images[:2], weights)
    an_image = bytes_an_image(loss, trace, weights)
    kept = Recordings(loss, trace, weights, 7 * an_image)
    for _ in range(2):
        held = [recording.nbytes() for _, _, recording in kept.batches()]
        assert held[0] > 0 and held[2:] == [0, 0] and sum(held) <= 7 * an_image
    assert bounded(loss, trace, weights, 1000 * an_image).batch_size == 3
    assert bounded(loss, trace, weights, 0).batch_size == 1


class Squares(nn.Module):
    """Activations that no module returns."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.conv, self.head, self.times = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5), times

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        for _ in range(self.times):
            h = (h * h).sigmoid()
        return self.head(h.mean((2, 3)))


def test_batches_are_smaller_where_a_backward_pass_keeps_more(adv: AdversarialSet) -> None:
    def batch(model: nn.Module) -> int:
        loss = RobustLoss(model, adv, 1000, torch.device("cpu"))
        weights = [t.weight for t in find_targets(model)]
        found = bounded(loss, replay.trace_calls(model, adv.images[:2], weights), weights, 1 << 20).batch_size
        assert not any(p.requires_grad for p in model.parameters())
        return found

    few, many = (batch(Squares(times).eval().requires_grad_(False)) for times in (1, 20))
    assert few > 5 * many


def test_another_path_than_the_trace_is_computed_plainly(adv: AdversarialSet, no_plateau: None) -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x)) if len(x) == 2 else self.a(self.b(x).relu())
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Fickle().double()
    expected = plain_boundary(model, adv, 0.1, (0.1,))
    found = by_name(measure(model, adv, settings(rho=0.1), radii=()))
    assert found == pytest.approx({name: rises[0] for name, rises in expected.items()}, rel=1e-6)


class Sometimes(nn.Module):
    """Uses one of its layers on bright batches only, and gives another away for its parent to apply."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.own = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Giving()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if x.mean() > 0.5:
            h = self.b(h.relu())
        return nn.functional.linear(h.mean((2, 3)), self.own())


class Giving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5, bias=False)

    def forward(self) -> Tensor:
        return self.inner.weight


@pytest.mark.parametrize("estimator", ["boundary", "ascent"])
def test_batches_that_do_not_use_a_weight_and_modules_that_return_theirs(estimator: str) -> None:
    adv = noise_set((3, 4, 4), 5, count=8)
    bright = torch.arange(8).view(-1, 1, 1, 1) % 4 < 2
    images = torch.where(bright, 0.6 + 0.4 * adv.images, 0.4 * adv.images)
    adv = AdversarialSet(images, adv.labels, THREAT, adv.seed)
    profile = measure(Sometimes().double(), adv, settings(estimator=estimator, rho=0.3), radii=(), batch_size=2)
    assert all(value > 0 for value in by_name(profile).values())
    assert set(by_name(profile)) == {"a", "b", "own.inner"}


def test_tied_weights_move_together(adv: AdversarialSet, no_plateau: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.double()
    model[2].weight = model[0].weight
    small = AdversarialSet(adv.images, adv.labels % 3, THREAT, 0)
    profile = measure(model, small, settings(rho=0.1), radii=())
    expected = plain_boundary(model, small, 0.1, (0.1,))
    assert by_name(profile) == pytest.approx({name: rises[0] for name, rises in expected.items()}, rel=1e-6)
    assert model[2].weight is model[0].weight
