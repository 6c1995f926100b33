"""Architectures by name, users' own files, and other people's checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.models import cifar, registry
from robust_prune.models.artifact import Loaded
from robust_prune.models.foreign import open_model
from robust_prune.models.normalization import NormalizedClassifier
from robust_prune.models.spec import ModelSpec

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FACTS: dict[str, Any] = {"num_classes": 7, "input_size": (3, 32, 32), "mean": MEAN, "std": STD}
SMALL = "cifar/resnet20_x0.25"

USER_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))

def make_model(num_classes, width=8):
    return Net(num_classes, width)

def fixed():
    return Net(7)

def broken(num_classes):
    missing = {}
    return missing["key"]

def tuple_out(num_classes):
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), 1
    return Pair(num_classes)

def not_a_module():
    return 3
"""


def make_spec(arch: str, **changes: Any) -> ModelSpec:
    return registry.make_spec(arch, **(FACTS | changes))


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(USER_FILE)
    return path


def randomised(model: nn.Module) -> nn.Module:
    """Norm layers away from their neutral start, so that equal outputs mean equal networks."""
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.2)
    return model.eval()


# ---------------------------------------------------------------------------------------------- our architectures


OURS = ["resnet18_x0.25", "resnet34_x0.125", "resnet20", "resnet32_x0.5", "preact_resnet18_x0.25", "vgg16_bn_x0.25",
        "wideresnet_16_1", "wideresnet_10_0.5", "mobilevit_xs_x0.5"]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_cifar_models_train_and_answer_per_image(name: str) -> None:
    torch.manual_seed(0)
    model = cifar.create(name, 7)
    x = torch.rand(4, 3, 32, 32)
    loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 6]))
    loss.backward()
    reached = [p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()]
    assert all(reached)
    model.eval()
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    assert together.shape == (4, 7)
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.174), ("preact_resnet18", 11.172), ("wideresnet_28_10", 36.479), ("wideresnet_34_10", 46.160),
     ("resnet20", 0.272), ("vgg16_bn", 14.728)],
)  # fmt: skip
def test_published_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = cifar.create(name, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.001)


def test_wide_resnet_has_the_layout_of_published_checkpoints() -> None:
    model = cifar.create("wideresnet_16_2", 10, sub_block1=True)
    keys = set(model.state_dict())
    for key in ("conv1.weight", "block1.layer.0.conv1.weight", "block1.layer.0.convShortcut.weight", "bn1.running_mean",
                "block3.layer.1.bn2.weight", "sub_block1.layer.0.conv2.weight", "fc.bias"):  # fmt: skip
        assert key in keys
    assert model.nChannels == 128
    assert model.block1.layer[1].convShortcut is None


def test_mobilevit_keeps_timms_names_and_divides_into_patches() -> None:
    import timm

    ours = cifar.create("mobilevit_xs", 10)
    theirs = timm.create_model("mobilevit_xs", num_classes=10)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    sides: list[tuple[int, int]] = []
    for module in ours.modules():
        if hasattr(module, "patch_size"):
            module.register_forward_pre_hook(lambda _, args: sides.append(tuple(args[0].shape[-2:])))
    with torch.no_grad():
        ours.eval()(torch.rand(1, 3, 32, 32))
    assert sides == [(16, 16), (8, 8), (4, 4)]


def test_width_factor_scales_every_stage() -> None:
    model = cifar.create("resnet20_x2", 10)
    assert [model.layer1[0].conv1.out_channels, model.layer3[0].conv1.out_channels] == [32, 128]


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("resnet2", {}, "Did you mean cifar/resnet"),
        ("resnet20_x0", {}, "above 0"),
        ("wideresnet_27_10", {}, "6n + 4"),
        ("resnet20", {"depth": 3}, "takes no argument 'depth'"),
        ("resnet20_x2", {"width": 3}, "takes no argument 'width'"),
    ],
)
def test_cifar_refusals(name: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("+", r"\+")):
        cifar.create(name, 10, **kwargs)


# ---------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("arch", [SMALL, "timm/resnet10t", "torchvision/squeezenet1_1"])
def test_build_normalizes_inside(arch: str) -> None:
    model = registry.build(make_spec(arch))
    assert isinstance(model, NormalizedClassifier) and model.training
    model.eval()
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor(MEAN)[None, :, None, None]) / torch.tensor(STD)[None, :, None, None]
    with torch.no_grad():
        assert torch.allclose(model(x), model.backbone(by_hand), atol=1e-5)


def test_timm_gets_classes_channels_and_image_size() -> None:
    spec = registry.make_spec(
        "timm/vit_tiny_patch16_224", num_classes=5, input_size=(1, 32, 48), mean=(0.5,), std=(0.5,), kwargs={"depth": 1}
    )
    model = registry.build(spec).eval()
    assert model(torch.rand(2, 1, 32, 48)).shape == (2, 5)
    assert len(model.backbone.blocks) == 1


def test_torchvision_auxiliary_heads_are_off() -> None:
    model = registry.build(make_spec("torchvision/googlenet"))
    assert model.backbone.aux1 is None
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_grey_images_reach_only_models_that_take_them() -> None:
    grey = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    assert registry.build(make_spec(SMALL, **grey)).backbone.conv1.in_channels == 1
    with pytest.raises(UsageError, match="3-channel"):
        registry.build(make_spec("torchvision/resnet18", **grey))


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm/resnt18", "Did you mean timm/resnet18"),
        ("timm/resnet18.no_such_tag", "unknown architecture"),
        ("torchvision/resnet19", "Did you mean torchvision/resnet18"),
        ("resnet20", "Did you mean cifar/resnet20"),
        ("nowhere.py:make", "does not exist"),
        ("hf-hub:someone/model", "unknown architecture"),
    ],
)
def test_unknown_architectures(arch: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_spec(arch)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 1}, "at least 2"),
        ({"mean": (0.5,)}, "one number for each of 3"),
        ({"std": (0.1, 0.0, 0.1)}, "above 0"),
        ({"input_size": (3, 32)}, "channels, height, width"),
        ({"class_names": ("a", "b")}, "2 class names for 7"),
        ({"kwargs": {"norm_layer": nn.BatchNorm2d}}, "plain JSON"),
    ],
)
def test_spec_values_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_spec(SMALL, **changes)


def test_refused_arguments_and_sizes_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"cannot build timm/resnet10t.*no_such"):
        registry.build(make_spec("timm/resnet10t", kwargs={"no_such": 1}))
    with pytest.raises(UsageError, match="cannot run on 3x4x4 images"):
        registry.build(make_spec("cifar/vgg16_bn_x0.25", input_size=(3, 4, 4)))


def test_pretrained_without_a_network_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked: list[bool] = []

    def offline(name: str, pretrained: bool, **_: Any) -> nn.Module:
        asked.append(pretrained)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(EnvironmentProblem, match="cannot download the published weights of timm/resnet18"):
        registry.build(make_spec("timm/resnet18", kwargs={"pretrained": True}))
    assert asked == [True]
    with pytest.raises(UsageError, match="no published weights"):
        registry.build(make_spec(SMALL, kwargs={"pretrained": True}))


def test_list_models_by_prefix() -> None:
    assert "cifar/preact_resnet18" in registry.list_models("cifar/")
    assert "timm/resnet18" in registry.list_models("timm/resnet18")
    assert all(name.startswith("torchvision/resnet") for name in registry.list_models("torchvision/resnet"))
    assert "torchvision/resnet18" in registry.list_models("torchvision/")
    assert registry.list_models("nowhere/") == []


def test_checking_the_output_leaves_every_modules_mode_alone() -> None:
    model = registry.build(make_spec(SMALL), check=False)
    model.backbone.bn1.eval()
    before = [module.training for module in model.modules()]
    registry.check_output(model, make_spec(SMALL))
    assert [module.training for module in model.modules()] == before


# ---------------------------------------------------------------------------------------------- a user's own file


def test_user_function_is_called_with_what_it_accepts(user_file: Path) -> None:
    model = registry.build(make_spec(f"{user_file}:make_model", kwargs={"width": 4}))
    assert model.backbone.conv.out_channels == 4 and model.backbone.head.out_features == 7
    assert registry.build(make_spec(f"{user_file}:fixed")).backbone.head.out_features == 7


def test_user_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_blocks.py").write_text("from torch import nn\nhead = nn.Linear\n")
    path = tmp_path / "with_import.py"
    path.write_text(
        "from torch import nn\nfrom neighbour_blocks import head\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), head(3072, num_classes))\n"
    )
    assert registry.build(make_spec(f"{path}:make"))(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("broken", r"my_model.py:22: KeyError: 'key'"),
        ("make_modle", "Did you mean make_model"),
        ("tuple_out", "logits alone"),
        ("not_a_module", "must return a torch.nn.Module, got int"),
    ],
)
def test_errors_in_a_users_file_are_named(user_file: Path, function: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.build(make_spec(f"{user_file}:{function}"))


def test_errors_while_importing_and_running_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import torch\n\ndef make(:\n    pass\n")
    with pytest.raises(UsageError, match=r"bad.py:3: SyntaxError"):
        registry.build(make_spec(f"{path}:make"))
    path.write_text("import torch\nimport no_such_package_here\n")
    with pytest.raises(UsageError, match=r"bad.py:2: ModuleNotFoundError"):
        registry.build(make_spec(f"{path}:make"))
    path.write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x @ 3\n"
        "def make():\n    return Net()\n"
    )
    with pytest.raises(UsageError, match=r"cannot run on 3x32x32 images: .*bad.py:4: TypeError"):
        registry.build(make_spec(f"{path}:make"))


def test_wrong_number_of_classes_is_seen_at_once(user_file: Path) -> None:
    with pytest.raises(UsageError, match=r"logits \(1, 9\), but gave \(1, 7\)"):
        registry.build(make_spec(f"{user_file}:fixed", num_classes=9))


def test_a_changed_user_file_is_refused(user_file: Path) -> None:
    spec = make_spec(f"{user_file}:make_model")
    assert len(spec.source_sha256) == 64
    user_file.write_text(USER_FILE + "\n# touched\n")
    with pytest.raises(UsageError, match="has changed"):
        registry.build(spec)


def test_a_file_without_a_function_is_explained(user_file: Path) -> None:
    with pytest.raises(UsageError, match="names no function"):
        make_spec(str(user_file))


# ---------------------------------------------------------------------------------------------- foreign checkpoints


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    return randomised(cifar.create("resnet20_x0.25", 7))


def same_as(loaded: Loaded, donor: nn.Module) -> bool:
    theirs, ours = donor.state_dict(), loaded.model.backbone.state_dict()
    return theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


WRAPPINGS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "nested twice": lambda s: {"model": {"state_dict": s}},
    "ema only": lambda s: {"model_ema": s},
    "DataParallel": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "both": lambda s: prefixed("module._orig_mod.", s),
    "backbone": lambda s: prefixed("backbone.", s),
    "lightning": lambda s: {"state_dict": prefixed("model.net.", s)},
    "AveragedModel": lambda s: prefixed("module.", s) | {"n_averaged": torch.tensor(7)},
    "no batch counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dicts_in_every_wrapping(tmp_path: Path, donor: nn.Module, wrapping: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(WRAPPINGS[wrapping](dict(donor.state_dict())), path)
    loaded = open_model(path, arch=SMALL, **FACTS)
    if wrapping != "no batch counters":
        assert same_as(loaded, donor)
    assert not loaded.model.training
    x = torch.rand(2, 3, 32, 32)
    normalized = (x - torch.tensor(MEAN)[None, :, None, None]) / torch.tensor(STD)[None, :, None, None]
    with torch.no_grad():
        assert torch.allclose(loaded.model(x), donor(normalized), rtol=1e-4)


def test_plain_safetensors_and_legacy_files(tmp_path: Path, donor: nn.Module) -> None:
    import safetensors.torch

    safetensors.torch.save_file(donor.state_dict(), tmp_path / "m.safetensors")
    torch.save(donor.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "old.pth"):
        assert same_as(open_model(tmp_path / name, arch=SMALL, **FACTS), donor)


def test_normalization_inside_the_checkpoint_wins(tmp_path: Path, donor: nn.Module) -> None:
    stored = prefixed("model.", donor.state_dict())
    stored |= {"mu": torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), "sigma": torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)}
    torch.save(stored, tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, **FACTS)
    assert loaded.spec.mean == pytest.approx((0.1, 0.2, 0.3)) and loaded.spec.std == pytest.approx((0.9, 0.8, 0.7))
    assert loaded.model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert loaded.provenance["normalization_from"] == "checkpoint"
    assert same_as(loaded, donor)


def test_the_choice_between_weights_and_their_average_is_recorded(tmp_path: Path, donor: nn.Module) -> None:
    other = {key: torch.zeros_like(tensor) for key, tensor in donor.state_dict().items()}
    torch.save({"model": donor.state_dict(), "model_ema": other}, tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, **FACTS)
    assert same_as(loaded, donor)
    assert loaded.provenance["weights_from"] == "model"
    assert loaded.provenance["weights_not_used"] == ["model_ema"]


def test_a_users_model_with_a_plain_state_dict(tmp_path: Path, user_file: Path) -> None:
    spec = make_spec(f"{user_file}:make_model")
    state = randomised(registry.build(spec).backbone).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    loaded = open_model(tmp_path / "weights.pt", arch=f"{user_file}:make_model", **FACTS)
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.model.backbone.state_dict().items())
    assert loaded.spec.source_sha256 == spec.source_sha256


def _missing(tmp: Path, _: nn.Module) -> Path:
    (tmp / "model.pt").write_bytes(b"x")
    return tmp / "modle.pt"


def _text(tmp: Path, _: nn.Module) -> Path:
    (tmp / "model.pt").write_text("these are not the weights you are looking for\n")
    return tmp / "model.pt"


def _empty(tmp: Path, _: nn.Module) -> Path:
    (tmp / "model.pt").touch()
    return tmp / "model.pt"


def _noise(tmp: Path, _: nn.Module) -> Path:
    (tmp / "model.pt").write_bytes(bytes(range(255, 0, -1)) * 4)
    return tmp / "model.pt"


def _torn_zip(tmp: Path, donor: nn.Module) -> Path:
    torch.save(donor.state_dict(), tmp / "whole.pt")
    whole = (tmp / "whole.pt").read_bytes()
    (tmp / "torn.pt").write_bytes(whole[: len(whole) // 2])
    return tmp / "torn.pt"


def _torn_safetensors(tmp: Path, donor: nn.Module) -> Path:
    import safetensors.torch

    data = safetensors.torch.save(donor.state_dict())
    (tmp / "torn.safetensors").write_bytes(data[: len(data) // 2])
    return tmp / "torn.safetensors"


def _number(tmp: Path, _: nn.Module) -> Path:
    torch.save(3, tmp / "model.pt")
    return tmp / "model.pt"


def _optimizer_only(tmp: Path, _: nn.Module) -> Path:
    torch.save({"epoch": 3, "lr": 0.1}, tmp / "model.pt")
    return tmp / "model.pt"


def _module(tmp: Path, donor: nn.Module) -> Path:
    torch.save(donor, tmp / "model.pt")
    return tmp / "model.pt"


def _larger(tmp: Path, _: nn.Module) -> Path:
    torch.save(cifar.create("resnet20_x0.5", 7).state_dict(), tmp / "model.pt")
    return tmp / "model.pt"


def _other_family(tmp: Path, _: nn.Module) -> Path:
    torch.save(cifar.create("vgg16_bn_x0.125", 7).state_dict(), tmp / "model.pt")
    return tmp / "model.pt"


def _other_classes(tmp: Path, _: nn.Module) -> Path:
    torch.save(cifar.create("resnet20_x0.25", 100).state_dict(), tmp / "model.pt")
    return tmp / "model.pt"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_missing, r"does not exist\. Did you mean model.pt"),
        (_text, "is a text file, not a weight file"),
        (_empty, "is empty"),
        (_noise, "of an unknown kind"),
        (_torn_zip, "damaged, incomplete"),
        (_torn_safetensors, "damaged or incomplete safetensors"),
        (lambda tmp, _: tmp, "is a folder"),
        (_number, "holds a int, not weights"),
        (_optimizer_only, "holds no weights: found the keys epoch, lr"),
        (_module, "trust-pickle"),
        (_larger, r"have another shape \(conv1.weight is 8x3x3x3 in the file, 4x3x3x3 in the model"),
        (_other_family, r"tensors are missing \(conv1.weight, .*unexpected \(features.0.weight"),
        (_other_classes, "tells 100 classes apart, the data have 7"),
        (lambda *_: Path("timm/resnet18"), "is an architecture, not a model file"),
    ],
)
def test_wrong_inputs_end_in_one_clear_line(tmp_path: Path, donor: nn.Module, make: Any, words: str) -> None:
    path = make(tmp_path, donor)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match=words) as raised:
        open_model(path, arch=SMALL, **FACTS)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert raised.value.exit_code == 2
    assert sorted(os.listdir(tmp_path)) == before


def test_foreign_weights_need_an_architecture_and_data(tmp_path: Path, donor: nn.Module) -> None:
    torch.save(donor.state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="Add --arch"):
        open_model(tmp_path / "m.pt", **FACTS)
    with pytest.raises(UsageError, match="input_size, mean, std must be known"):
        open_model(tmp_path / "m.pt", arch=SMALL, num_classes=7)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Payload(tmp_path / "ran")}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="would run code"):
        open_model(tmp_path / "m.pt", arch=SMALL, **FACTS)
    assert not (tmp_path / "ran").exists()


def test_pickled_modules_only_with_trust(tmp_path: Path, donor: nn.Module) -> None:
    torch.save({"model": nn.DataParallel(donor)}, tmp_path / "m.pt")
    assert same_as(open_model(tmp_path / "m.pt", arch=SMALL, trust_pickle=True, **FACTS), donor)
    with pytest.raises(UsageError, match=r"holds a pickled module .* Add --arch"):
        open_model(tmp_path / "m.pt", trust_pickle=True, **FACTS)


def test_a_pickled_module_that_was_cut_keeps_its_shape(tmp_path: Path) -> None:
    cut = randomised(cifar.create("resnet20_x0.25", 7))
    block = cut.layer1[0]
    block.conv1.weight = nn.Parameter(block.conv1.weight[:3].clone())
    block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = 3
    for name in ("weight", "bias"):
        setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name)[:3].clone()))
    for name in ("running_mean", "running_var"):
        setattr(block.bn1, name, getattr(block.bn1, name)[:3].clone())
    block.conv2.weight = nn.Parameter(block.conv2.weight[:, :3].clone())
    torch.save(cut, tmp_path / "cut.pt")
    loaded = open_model(tmp_path / "cut.pt", arch=SMALL, trust_pickle=True, **FACTS)
    assert loaded.model.backbone.layer1[0].conv1.out_channels == 3
    assert same_as(loaded, cut)
