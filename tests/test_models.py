"""Architectures by name and users' own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import MEAN, SMALL, STD, USER_FILE, make_spec
from torch import nn

from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.models import cifar, registry
from robust_prune.models.normalization import NormalizedClassifier


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(USER_FILE)
    return path


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
