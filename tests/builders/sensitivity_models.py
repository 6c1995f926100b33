"""Models, adversarial sets and plain re-computations for the tests of sensitivity."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_prune.attacks.threat import ThreatModel
from robust_prune.recipe import SensitivitySection
from robust_prune.recipe_reader import make_section
from robust_prune.sensitivity import ascent, initial_directions
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.sensitivity.profile import SensitivityProfile
from robust_prune.sensitivity.search import SHORT
from robust_prune.sensitivity.targets import find_targets
from robust_prune.structure.types import ChannelGroup, GroupSlice

THREAT = ThreatModel("linf", 8 / 255)


class Block(nn.Module):
    """Residual block with in-place activations, an in-place sum and an in-place write to its own input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class Shift(nn.Module):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(0.2)


class TinyResNet(nn.Module):
    """Blocks, writes in place, a convolution called twice, a weight its parent reads, attention, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Block(6), Block(6))
        self.norm, self.shift, self.alias = nn.BatchNorm2d(6), Shift(), nn.Identity()
        self.shared = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.layer2 = nn.Sequential(Block(6))
        self.functional = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.unused = nn.Linear(4, 4)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.layer1(x))
        y += x  # writes over what the norm returned
        self.shift(y)  # works by changing its input
        z = self.alias(y)
        z += 0.3  # changes y too
        x = self.layer2(self.shared(F.relu(self.shared(y + z))))
        x = F.avg_pool2d(x, 4)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = F.linear(tokens, self.functional.weight, self.functional.bias)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.flatten(tokens.mean(1, keepdim=True)))


def randomised_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch-norm away from its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight.data, 0.5), (module.bias.data, -0.3), (module.running_mean, -0.2)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def noise_set(shape: tuple[int, ...], classes: int, count: int = 12, seed: int = 0) -> AdversarialSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((count, *shape), generator=generator)
    return AdversarialSet(images, torch.randint(classes, (count,), generator=generator), THREAT, seed)


def settings(**values: Any) -> SensitivitySection:
    return make_section(SensitivitySection, **values)


def mean_loss(model: nn.Module, adv: AdversarialSet, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.cross_entropy(model(adv.images.to(dtype)), adv.labels)


def loss_value(model: nn.Module, adv: AdversarialSet, dtype: torch.dtype = torch.float32) -> float:
    return mean_loss(model, adv, dtype).item()


def by_name(profile: SensitivityProfile) -> dict[str, float]:
    return {module.name: module.mrs for module in profile.modules}


def plain_boundary(
    model: nn.Module, adv: AdversarialSet, rho: float, radii: tuple[float, ...]
) -> dict[str, list[float]]:
    """The boundary estimator with every pass whole and every weight written in place; for double precision.

    All images must fit into the search, which must not stop at a plateau.
    """
    model.eval()
    targets = {id(t.weight): t for t in find_targets(model)}.values()
    weights = [t.weight for t in targets]
    originals = [w.detach().clone() for w in weights]

    def put(position: int, direction: Tensor, length: float) -> None:
        start = originals[position]
        with torch.no_grad():
            weights[position].copy_(start + length * start.norm() * direction / direction.norm())

    def slopes(labels: Tensor = adv.labels) -> tuple[float, list[Tensor | None]]:
        loss = F.cross_entropy(model(adv.images.double()), labels)
        return loss.item(), list(torch.autograd.grad(loss, weights, allow_unused=True))

    base, first = slopes()
    live = [i for i, slope in enumerate(first) if slope is not None]

    def joint_climb(directions: list[Tensor | None]) -> list[Tensor | None]:
        for _ in range(initial_directions.JOINT_STEPS):
            for i in live:
                put(i, directions[i], initial_directions.JOINT_SHARE * rho)
            directions = slopes()[1]
        for i in live:
            put(i, first[i], 0.0)
        return directions

    def climb(i: int, direction: Tensor, steps: int) -> tuple[float, Tensor]:
        best: tuple[float, Tensor] = (-float("inf"), direction)
        stride, uphill = ascent.STRIDE, first[i]
        for _ in range(steps):
            put(i, direction, rho)
            value, found = slopes()
            if value > best[0]:
                best, uphill = (value, weights[i].detach() - originals[i]), found[i]
            else:
                stride *= ascent.SHORTER
            direction = best[1] + stride * rho * originals[i].norm() / uphill.norm() * uphill
        return best

    def first_step(i: int, direction: Tensor) -> tuple[float, Tensor]:
        put(i, direction, rho)
        value, found = slopes()
        delta, uphill, radius = weights[i].detach() - originals[i], found[i], rho * originals[i].norm()
        put(i, direction, 0.0)
        moved = delta + ascent.STRIDE * radius * uphill / uphill.norm()
        promise = value + float((uphill * (radius * uphill / uphill.norm() - delta)).sum())
        return promise, moved / moved.norm()

    with torch.no_grad():
        likely = model(adv.images.double()).softmax(1).sum(0).argsort(descending=True)[: initial_directions.CLASSES]
    begun = [joint_climb(first)]
    for label in likely:
        towards = slopes(torch.full_like(adv.labels, int(label)))[1]
        begun.append(joint_climb([None if d is None else -d for d in towards]))
    rises = {t.name: [0.0] * len(radii) for t in find_targets(model)}
    for i in live:
        held: list[tuple[float, Tensor]] = []
        for directions in begun:
            initial_directions.keep(held, *first_step(i, directions[i]), SHORT.initial_directions)
        best = max((climb(i, direction, SHORT.compare_steps) for _, direction in held), key=lambda pair: pair[0])[1]
        best = climb(i, best, SHORT.steps)[1]
        top = 0.0
        for k, radius in enumerate(radii):
            put(i, best, radius)
            top = max(top, loss_value(model, adv, torch.float64) - base)
            for target in find_targets(model):
                if target.weight is weights[i]:
                    rises[target.name][k] = top
        put(i, best, 0.0)
    return rises


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


def group(name: str, *producers: str) -> ChannelGroup:
    parts = tuple(GroupSlice(p, "out", tuple(range(6)), tuple(range(6))) for p in producers)
    return ChannelGroup(name, 6, parts)
