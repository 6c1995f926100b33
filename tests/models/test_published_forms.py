"""Weights in the forms in which people publish them: accuracy is that of plain torch on the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.weights import randomised
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.data.base import DataBundle, TensorImages
from robust_prune.data.sample import load_sample
from robust_prune.models import cifar

ROBUSTBENCH = '''
"""A WideResNet as RobustBench writes it: normalization inside, and a stage that forward never calls."""
import torch
from robust_prune.models.cifar.wideresnet import WideResNet

class Net(WideResNet):
    def __init__(self):
        super().__init__(10, 1, num_classes=4, sub_block1=True)
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1))

    def forward(self, x):
        return super().forward((x - self.mean) / self.std)
'''


@torch.no_grad()
def labelled(network: nn.Module, normalize: Callable[[Tensor], Tensor], count: int = 100) -> DataBundle:
    """Photos, each labelled with what the network answers to it when it is normalized rightly."""
    sample = load_sample()
    images = sample.test.get(torch.arange(count))[0]
    x = normalize(images.float() / 255)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
    network.train()(x)
    logits = network.eval()(x)
    [m for m in network.modules() if isinstance(m, nn.Linear)][-1].bias -= logits.mean(0)
    part = TensorImages(images, network(x).argmax(1))
    return DataBundle("photos", part, part, part, tuple("abcd"), sample.mean, sample.std, (3, 32, 32))


def half(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.5


def plain(x: Tensor) -> Tensor:
    return x


def robustbench(folder: Path) -> tuple[nn.Module, str, Callable[[Tensor], Tensor], Callable[[Any], Any]]:
    (folder / "net.py").write_text(ROBUSTBENCH)
    space: dict[str, Any] = {}
    exec(ROBUSTBENCH, space)
    return space["Net"](), f"{folder / 'net.py'}:Net", plain, lambda state: {f"module.{k}": t for k, t in state.items()}


def timm_checkpoint(folder: Path) -> tuple[nn.Module, str, Callable[[Tensor], Tensor], Callable[[Any], Any]]:
    import timm

    network = timm.create_model("test_resnet", num_classes=4)
    return network, "timm/test_resnet", half, lambda state: {"epoch": 3, "arch": "test_resnet", "state_dict": state}


def lightning(folder: Path) -> tuple[nn.Module, str, Callable[[Tensor], Tensor], Callable[[Any], Any]]:
    def wrapped(state: Any) -> Any:
        extra = {"loss.weight": torch.ones(4), "accuracy.total": torch.tensor(5)}
        return {"state_dict": {f"model.{k}": t for k, t in state.items()} | extra, "pytorch-lightning_version": "2.5"}

    return cifar.create("resnet20_x0.25", 4), "cifar/resnet20_x0.25", plain, wrapped


def torchvision_checkpoint(folder: Path) -> tuple[nn.Module, str, Callable[[Tensor], Tensor], Callable[[Any], Any]]:
    from torchvision import models, transforms

    imagenet = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    network = models.shufflenet_v2_x0_5(num_classes=4)
    return network, "torchvision/shufflenet_v2_x0_5", imagenet, lambda state: {"model": state, "epoch": 9}


@pytest.mark.parametrize("form", [robustbench, timm_checkpoint, lightning, torchvision_checkpoint])
def test_accuracy_is_that_of_plain_torch(tmp_path: Path, form: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    network, arch, normalize, wrap = form(tmp_path)
    network = randomised(network)
    data = labelled(network, normalize)
    torch.save(wrap(dict(network.state_dict())), tmp_path / "published.pt")
    loaded = rp.load(tmp_path / "published.pt", arch=arch, data=data)
    x, y = data.test.get(torch.arange(100))
    assert len(y.unique()) > 1
    with torch.no_grad():
        assert torch.equal(loaded(x.float() / 255).argmax(1), y), loaded.provenance["notes"]
