"""Our architectures for small images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robust_prune.errors import UsageError
from robust_prune.models import cifar

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
