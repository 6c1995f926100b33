"""Architectures by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.model_files import MEAN, SMALL, STD, make_spec
from torch import nn

from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.models import registry
from robust_prune.models.normalization import NormalizedClassifier


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


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg"])
def test_no_argument_may_name_another_file_of_weights(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} would let timm/resnet10t read other files"):
        registry.build(make_spec("timm/resnet10t", kwargs={name: "x.pth"}))
