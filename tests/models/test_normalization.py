"""The normalization of weights: what may be asked for, and what is measured where nothing says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.data.base import DataBundle, TensorImages
from robust_prune.errors import UsageError
from robust_prune.models.foreign import open_model
from robust_prune.models.normalization import Normalization, parse
from robust_prune.models.normalization_choice import choose, normalizes_inside

CLASSES = 5
LEVELS = torch.tensor([40.0, 80.0, 120.0, 160.0, 200.0])


def levels(channels: int = 3, count: int = 120) -> DataBundle:
    """Images whose brightness is their class."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(-12, 13, (count, channels, 6, 6), generator=torch.Generator().manual_seed(0))
    images = (LEVELS[labels][:, None, None, None] + noise).byte()
    part = TensorImages(images, labels)
    mean, std = images.float().mean((0, 2, 3)) / 255, images.float().std((0, 2, 3)) / 255
    numbers = (tuple(mean.tolist()), tuple(std.tolist()))
    return DataBundle("levels", part, part, part, tuple("abcde"), *numbers, (channels, 6, 6))


class Brightness(nn.Module):
    """Tells the levels apart if its images were normalized by `mean` and `std`."""

    def __init__(self, mean: float, std: float, channels: int = 3, batchnorm: bool = False) -> None:
        super().__init__()
        self.centres = nn.Parameter((LEVELS / 255 - mean) / std)
        self.scale = nn.Parameter(torch.tensor(std))
        self.norm = nn.BatchNorm2d(channels) if batchnorm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        brightness = x.mean((1, 2, 3))
        return -((brightness[:, None] - self.centres) / self.scale).square()


@pytest.mark.parametrize(("mean", "std", "name"), [(0.0, 1.0, "none"), (0.5, 0.5, "0.5/0.5"), (0.0, 1 / 255, "0-255")])
def test_the_most_accurate_normalization_is_chosen_and_all_are_shown(mean: float, std: float, name: str) -> None:
    choice = choose(Brightness(mean, std), levels())
    assert choice.normalization.name == name
    for shown in ("64 training images", "none ", "data ", "imagenet ", "0.5/0.5 ", "0-255 ", f"{name} 100.0 %"):
        assert shown in choice.reason


def test_what_is_expected_is_kept_unless_another_is_better() -> None:
    data = levels()
    own = Normalization("timm's", (0.48,) * 3, (0.5,) * 3)
    kept = choose(Brightness(0.48, 0.5), data, own, "the configuration of timm/x")
    assert kept.normalization is own and "the configuration of timm/x" in kept.reason
    other = choose(Brightness(0.0, 1.0), data, own, "the configuration of timm/x")
    assert other.normalization.name == "none" and "not timm's" in other.reason


class Indifferent(nn.Module):
    """Sees only where the image is brightest, which no normalization changes; its batch-norm may still tell."""

    def __init__(self, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.weight * nn.functional.one_hot(x.mean(1).flatten(1).argmax(1) % CLASSES, CLASSES).float()


def bright_spots() -> DataBundle:
    data = levels()
    images = torch.full((120, 3, 6, 6), 100, dtype=torch.uint8)
    for index, label in enumerate(data.train.get(torch.arange(120))[1].tolist()):
        images[index, :, 0, label] = 250
    part = TensorImages(images, torch.arange(120) % CLASSES)
    return DataBundle("spots", part, part, part, tuple("abcde"), (0.3,) * 3, (0.2,) * 3, (3, 6, 6))


def test_batchnorm_statistics_decide_between_equally_accurate_ones() -> None:
    data, norm = bright_spots(), nn.BatchNorm2d(3)
    images = data.train.get(torch.arange(120))[0].float() / 255
    half = (images - 0.5) / 0.5
    norm.running_mean, norm.running_var = half.mean((0, 2, 3)), half.var((0, 2, 3))
    before = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    assert choose(Indifferent(norm), data).normalization.name == "0.5/0.5"
    assert all(torch.equal(tensor, before[key]) for key, tensor in norm.state_dict().items())


class Rough(Brightness):
    """Right with two normalizations that differ, on different images; neither is clearly better."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((1, 2, 3)) * 255
        return (
            -((y[:, None] - LEVELS) / 255).square()
            if float(x.min()) >= 0
            else -(((y * 0.5 + 127.5)[:, None] - LEVELS) / 255).square()
        )


def test_a_tie_between_different_ones_is_a_question() -> None:
    with pytest.raises(
        UsageError, match=r"none and 0.5/0.5 are equally accurate.*--normalization none, data"
    ) as raised:
        choose(Jittered(Rough(0.0, 1.0)), levels())
    assert "\n" not in str(raised.value)


class Jittered(nn.Module):
    """Gives wrong answers to some images, others under each normalization."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        wrong = torch.arange(len(x)) % 8 == (1 if float(x.min()) >= 0 else 2)
        return torch.where(wrong[:, None], logits.roll(1, 1), logits)


def test_an_untrained_model_goes_on_with_a_word() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES))
    nn.init.zeros_(network[1].weight)
    choice = choose(network, levels())
    assert "like one that is not trained" in choice.reason and choice.normalization.name == "data"


@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
def test_a_network_with_its_own_statistics_is_recognised(kind: str) -> None:
    network = Brightness(0.0, 1.0)
    assert not normalizes_inside(network, 3)
    values = torch.rand(1, 3, 1, 1)
    for name in ("mu", "sigma"):
        if kind == "buffer":
            network.register_buffer(name, values)
        elif kind == "parameter":
            network.register_parameter(name, nn.Parameter(values, requires_grad=False))
        else:
            setattr(network, name, (0.5, 0.5, 0.5))
    assert normalizes_inside(network, 3) and not normalizes_inside(network, 1)


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [("none", (0, 0, 0), (1, 1, 1)), ("0.5/0.25", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
     ("0.1,0.2,0.3/0.4,0.5,0.6", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ("imagenet", (0.485, 0.456, 0.406), None)],
)  # fmt: skip
def test_normalizations_that_may_be_asked_for(
    text: str, mean: tuple[float, ...], std: tuple[float, ...] | None
) -> None:
    found = parse(text, levels())
    assert found is not None and found.mean == pytest.approx(mean) and (std is None or found.std == pytest.approx(std))


@pytest.mark.parametrize(
    ("text", "channels", "words"),
    [
        ("cifar", 3, "normalization is auto, none, data, imagenet, or MEAN/STD"),
        ("0.5/0", 3, r"deviations in \(0, 10\]"),
        ("nan/0.5", 3, r"means in \[-1, 1\]"),
        ("123.7,116.3,103.5/58.4,57.1,57.4", 3, "divided by 255"),
        ("0.5,0.5/0.5", 3, "2 means and 3 deviations for 3 channels"),
        ("imagenet", 1, "imagenet is for 3 channels"),
        ("", 3, "normalization is auto"),
    ],
)
def test_others_are_refused_in_one_line(text: str, channels: int, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        parse(text, levels(channels))
    assert "\n" not in str(raised.value)


def test_a_part_of_cifar_10_does_not_change_what_weights_mean() -> None:
    data = rp.load_data("sample")
    moved = DataBundle("part", data.train, data.validation, data.test, data.class_names,
                       (0.4893, 0.4801, 0.4450), (0.2455, 0.2428, 0.2630), data.input_size)  # fmt: skip
    assert parse("data", moved) == parse("data", data)


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(5))
    def forward(self, x):
        return -(x.mean((1, 2, 3))[:, None] - self.centres).square()
"""


@pytest.mark.parametrize("stored", ["metric", "settings"])
def test_a_stored_normalization_that_does_not_fit_is_not_applied(tmp_path: Path, stored: str) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    weights = {"state_dict": {"model.centres": LEVELS / 255}}
    if stored == "metric":
        weights["state_dict"] |= {"metric.mean": torch.full((3,), 0.9), "metric.std": torch.full((3,), 0.05)}
    torch.save(
        weights | ({"args": {"mean": [0.9] * 3, "std": [0.05] * 3}} if stored == "settings" else {}), tmp_path / "w.pt"
    )
    loaded = open_model(tmp_path / "w.pt", arch=f"{tmp_path / 'net.py'}:Net", data=levels())
    assert loaded.spec.mean == (0, 0, 0) and "not stored" in loaded.provenance["notes"][0]


def test_where_no_usual_normalization_fits_it_is_asked_for() -> None:
    data, norm = levels(), nn.BatchNorm2d(3)
    odd = (data.train.get(torch.arange(120))[0].float() / 255 - 0.3) / 0.02
    norm.running_mean, norm.running_var = odd.mean((0, 2, 3)), odd.var((0, 2, 3))
    network = Brightness(0.3, 0.02, batchnorm=True)
    network.norm = norm
    with pytest.raises(UsageError, match="with none of the usual ones the inputs of the first batch-norm layer"):
        choose(network, data)


def test_weights_of_plain_images_are_not_normalized_by_the_data(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    torch.save({"centres": LEVELS / 255}, tmp_path / "w.pt")
    data = levels()
    loaded = open_model(tmp_path / "w.pt", arch=f"{tmp_path / 'net.py'}:Net", data=data)
    assert loaded.spec.mean == (0, 0, 0) and loaded.spec.std == (1, 1, 1)
    x, y = data.test.get(torch.arange(50))
    assert torch.equal(loaded(x.float() / 255).argmax(1), y)
    assert "Normalization: none (measured on 64 training images" in loaded.provenance["notes"][0]
    asked = open_model(tmp_path / "w.pt", arch=f"{tmp_path / 'net.py'}:Net", data=data, normalization="0.5/0.5")
    assert asked.spec.mean == (0.5, 0.5, 0.5) and "as asked for" in asked.provenance["notes"][0]


def test_a_module_of_normalized_images_is_refused_or_opened_as_such() -> None:
    data = levels()
    with pytest.raises(UsageError, match=r"fits normalization 0.5/0.5 better .*normalization='0.5/0.5'"):
        rp.evaluate(Brightness(0.5, 0.5), data, steps=1, restarts=1)
    loaded = rp.load(Brightness(0.5, 0.5), data=data)
    assert loaded.spec.mean == (0.5, 0.5, 0.5)
    assert rp.load(Brightness(0.5, 0.5), data=data, normalization="none").spec.mean == (0, 0, 0)
