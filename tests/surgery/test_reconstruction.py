"""Least-squares repair of the layers behind a cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robust_prune.budget.types import PlannedGroup, PruningPlan
from robust_prune.errors import UsageError
from robust_prune.structure import least_squares
from robust_prune.structure.cutting import Place
from robust_prune.structure.groups import find_groups
from robust_prune.surgery import passes, reconstruction
from robust_prune.surgery.apply import Surgery, apply
from robust_prune.surgery.passes import Batches
from robust_prune.surgery.reconstruction import reconstruct


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1, stride=2)
        self.third = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean, model.norm.running_var):
            tensor.copy_(torch.rand_like(tensor) + 0.2)
    return model.eval()


def cut(model: nn.Module, removed: dict[str, tuple[int, ...]]) -> Surgery:
    groups = find_groups(model, torch.zeros(1, 3, 8, 8)).groups
    planned = tuple(PlannedGroup(g.name, g.channels, removed.get(g.name, ()), 0.0) for g in groups)
    plan = PruningPlan(0.5, "macs", "uniform", "magnitude", 1, planned, (), 1, 1, 1, 1)
    return apply(model, plan, torch.zeros(1, 3, 8, 8))


def test_a_copy_of_a_channel_is_replaced_without_loss(net: Net) -> None:
    with torch.no_grad():
        net.first.weight[5] = net.first.weight[2]
        for tensor in (net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var):
            tensor[5] = tensor[2]
    surgery = cut(net, {"first": (5,)})
    images = torch.rand(64, 3, 8, 8)
    with torch.no_grad():
        wanted = net(images)
        assert (surgery.model(images) - wanted).abs().max() > 1e-3
        assert reconstruct(surgery.model, net, surgery.removed, images, ridge=0) == ("second",)
        torch.testing.assert_close(surgery.model(images), wanted, rtol=0, atol=1e-5)


def test_it_finds_the_least_squares_solution(net: Net) -> None:
    surgery = cut(net, {"third": (0, 3, 7)})
    images = torch.rand(200, 3, 8, 8)
    with torch.no_grad():
        hidden = torch.relu(net.third(torch.relu(net.second(torch.relu(net.norm(net.first(images))))))).mean((2, 3))
        kept = hidden[:, [i for i in range(12) if i not in (0, 3, 7)]].double()
        rows = torch.cat([kept, torch.ones(200, 1, dtype=torch.float64)], 1)
        best = rows @ torch.linalg.lstsq(rows, net(images).double()).solution
        reconstruct(surgery.model, net, surgery.removed, images, ridge=0)
        torch.testing.assert_close(surgery.model(images).double(), best, rtol=1e-3, atol=1e-4)


def test_layers_are_solved_in_order_and_each_helps(net: Net) -> None:
    surgery = cut(net, {"first": (0, 1), "second": (2, 5, 6), "third": (1, 4)})
    images, unseen = torch.rand(256, 3, 8, 8), torch.rand(64, 3, 8, 8)
    state = copy.deepcopy(net.state_dict())
    surgery.model.train()
    with torch.no_grad():
        wanted = net(unseen)
        before = (copy.deepcopy(surgery.model).eval()(unseen) - wanted).square().mean()
        assert reconstruct(surgery.model, net, surgery.removed, images) == ("second", "third", "head")
        assert surgery.model.training and not net.training
        after = (surgery.model.eval()(unseen) - wanted).square().mean()
    assert after < before / 4
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *surgery.model.modules()))


def test_memory_can_be_bounded_without_another_result(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    images, found = torch.rand(20, 3, 8, 8), []
    for most in (1 << 26, 3 * 12 * 16 * 9):
        monkeypatch.setattr(least_squares, "MOST_ELEMENTS", most)
        surgery = cut(net, {"first": (0, 1), "second": (2, 5, 6)})
        assert reconstruct(surgery.model, net, surgery.removed, images) == ("second", "third")
        found.append(surgery.model.third.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_sample_of_the_rows_is_nearly_as_good_as_all(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    images, unseen = torch.rand(128, 3, 16, 16), torch.rand(64, 3, 16, 16)
    errors, counted = [], []
    original = reconstruction.input_rows
    monkeypatch.setattr(
        reconstruction, "input_rows", lambda *given: counted.append(len(rows := original(*given))) or rows
    )
    for least, most in ((1 << 15, 10**9), (0, 4)):
        monkeypatch.setattr(reconstruction, "LEAST_ROWS", least)
        monkeypatch.setattr(reconstruction, "ROWS_PER_INPUT", most)
        surgery = cut(net, {"first": (0, 1), "second": (2, 5, 6), "third": (1, 4)})
        counted.clear()
        assert reconstruct(surgery.model, net, surgery.removed, images) == ("second", "third", "head")
        errors.append((float((surgery.model(unseen) - net(unseen)).detach().square().mean()), sum(counted)))
    (whole, rows), (sampled, fewer) = errors
    assert fewer < rows / 10 and sampled < 1.5 * whole


class Paths(nn.Module):
    """Layers with unusual inputs: fewer positions for dark images, an expert for bright ones, a vector, flat tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 1)
        self.expert = nn.Linear(6, 6)
        self.vector = nn.Linear(6, 6)
        self.tokens = nn.Linear(6, 6)
        self.weights = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() < 0.5:
            x = x[:, :, ::4, ::4]
        y = self.last(torch.relu(self.stem(x)))
        y = self.tokens(y.flatten(2).transpose(1, 2).flatten(0, 1)).view(len(y), -1, 6).mean(1)
        bright = x.mean((1, 2, 3)) > 0.7
        y = y.clone()
        y[bright] = self.expert(y[bright])
        return y * self.vector(self.weights)


def test_layers_whose_rows_differ_by_batch_or_are_no_positions_of_images_are_fitted() -> None:
    torch.manual_seed(0)
    model = Paths().eval()
    small = copy.deepcopy(model)
    removed: dict[Place, tuple[int, ...]] = {}
    with torch.no_grad():
        for name in ("last", "expert", "vector", "tokens"):
            removed[name, "in", 0] = ()
            small.get_submodule(name).weight.add_(0.1)
    images = torch.cat([torch.rand(64, 3, 8, 8) * shade for shade in (0.3, 2.0, 1.1)]).clamp(0, 1)
    names = reconstruct(small, model, removed, images, ridge=0)
    assert set(names) == {"last", "tokens", "expert", "vector"}
    with torch.no_grad():
        assert torch.allclose(small(images[64:128]), model(images[64:128]), atol=1e-3)


def test_rows_are_drawn_anew_for_each_image_and_no_more_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, images = nn.Linear(4, 4), torch.rand(64, 50, 4)
    monkeypatch.setattr(reconstruction, "LEAST_ROWS", 300)
    monkeypatch.setattr(reconstruction, "ROWS_PER_INPUT", 1)
    batches = Batches(images.split(32), torch.device("cpu"), torch.float32, False)
    model = nn.Sequential(layer)
    most = reconstruction._most_rows(layer, batches)
    found = reconstruction._outputs(model, batches, {"0": (torch.arange(4), most)})["0"]
    assert [len(target.rows) for target in found] == [150, 150] and found[0].count == 32 * 50
    for target, part in zip(found, images.split(32), strict=True):
        assert torch.allclose(target.rows, layer(part).reshape(-1, 4)[target.at])
        assert len({int(at) % 50 for at in target.at}) > 40, "every position of some image"


def test_half_precision_does_not_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    small = copy.deepcopy(model)
    with torch.no_grad():
        small[2].weight.add_(0.1)
    images = 30 * torch.rand(64, 3, 16, 16)
    assert reconstruct(small.half(), model.half(), {("2", "in", 0): ()}, images, ridge=1e-6) == ("2",)
    with torch.no_grad():
        wanted = model(images.half())
        assert (small(images.half()) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_few_dense_outputs_at_a_time_give_the_same_result(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    images, found = torch.rand(20, 3, 8, 8), []
    for most in (1 << 28, 1):
        monkeypatch.setattr(reconstruction, "MOST_TARGETS", most)
        surgery = cut(net, {"first": (0, 1), "second": (2, 5, 6), "third": (1, 4)})
        assert reconstruct(surgery.model, net, surgery.removed, images) == ("second", "third", "head")
        found.append(surgery.model.head.weight.detach())
    assert torch.equal(*found)


class Residual(nn.Module):
    """A skip connection around two layers, an in-place activation, and a layer that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.rare, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = torch.relu(y + self.second(torch.relu(self.first(y))))
        if x.mean() > 0.5:
            z = self.rare(z)
        return self.head(z.mean((2, 3)))


def test_passes_that_go_on_where_the_last_one_ended_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images, names = Residual().eval(), torch.rand(40, 3, 8, 8), ("first", "second", "rare", "head")
    images = torch.cat([images * 0.6 + 0.4, images * 0.4])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            weight = changed.get_submodule(name).weight
            weight.add_(0.1 * torch.randn_like(weight))
    found, computed = [], []
    for most in (0, 1 << 30):
        monkeypatch.setattr(passes, "MOST_RECORDED", most)
        small = copy.deepcopy(changed)
        runs: list[int] = []
        small.stem[0].register_forward_pre_hook(lambda _, args, runs=runs: runs.append(len(args[0])))
        assert reconstruct(small, model, {(n, "in", 0): () for n in names}, images, batch_size=20) == names
        found.append(small.state_dict())
        computed.append(sum(runs))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert computed[1] < computed[0] / 2


def test_bf16_passes_find_nearly_the_same_solution(net: Net) -> None:
    images, unseen, found = torch.rand(64, 3, 8, 8), torch.rand(64, 3, 8, 8), []
    for bf16 in (False, True):
        surgery = cut(net, {"first": (0, 1), "second": (2, 5, 6), "third": (1, 4)})
        assert reconstruct(surgery.model, net, surgery.removed, images, bf16=bf16) == ("second", "third", "head")
        assert surgery.model.head.weight.dtype == torch.float32
        found.append(float((surgery.model(unseen) - net(unseen)).detach().square().mean()))
    assert found[1] < 1.1 * found[0]


def test_a_large_ridge_leaves_the_cut_weights(net: Net) -> None:
    surgery = cut(net, {"first": (0, 1)})
    before = surgery.model.second.weight.detach().clone()
    reconstruct(surgery.model, net, surgery.removed, torch.rand(16, 3, 8, 8), ridge=1e9)
    torch.testing.assert_close(surgery.model.second.weight.detach(), before, rtol=0, atol=1e-6)


def test_layers_that_are_not_their_weights_linear_map_are_left_alone(net: Net) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    net.second = Standardised(8, 12, 3, padding=1, stride=2)
    surgery = cut(net.eval(), {"first": (0, 1)})
    assert reconstruct(surgery.model, net, surgery.removed, torch.rand(16, 3, 8, 8)) == ()


def test_a_layer_with_too_many_inputs_is_left_alone(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    surgery = cut(net, {"first": (5,), "third": (0, 3)})
    monkeypatch.setattr(least_squares, "MOST_GRAM", 20**2)
    before = surgery.model.second.weight.clone()
    assert reconstruct(surgery.model, net, surgery.removed, torch.rand(16, 3, 8, 8)) == ("head",)
    assert torch.equal(surgery.model.second.weight, before)


def test_double_models_and_layers_called_by_keyword(net: Net) -> None:
    class Keyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.second(input=torch.relu(self.norm(self.first(x)))))
            return self.head(input=torch.relu(self.third(x)).mean((2, 3)))

    keyword = Keyword().eval()
    keyword.load_state_dict(net.state_dict())
    images, results = torch.rand(64, 3, 8, 8), []
    for model in (net.double(), keyword.double()):
        surgery = cut(model, {"first": (5,), "third": (0, 3)})
        assert reconstruct(surgery.model, model, surgery.removed, images) == ("second", "head")
        results.append(surgery.model.head.weight)
    torch.testing.assert_close(*results)


def test_a_layer_that_runs_twice_is_left_alone(net: Net) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x.flip(3))

    twice = Twice()
    twice.load_state_dict(net.state_dict())
    surgery = cut(twice.eval(), {"first": (0, 1)})
    assert reconstruct(surgery.model, twice, surgery.removed, torch.rand(16, 3, 8, 8)) == ()


def test_bad_requests(net: Net) -> None:
    surgery = cut(net, {"first": (0, 1)})
    with pytest.raises(UsageError, match="needs images and a ridge >= 0, got 0 images"):
        reconstruct(surgery.model, net, surgery.removed, torch.zeros(0, 3, 8, 8))
    with pytest.raises(UsageError, match="ridge -1"):
        reconstruct(surgery.model, net, surgery.removed, torch.rand(2, 3, 8, 8), ridge=-1)
