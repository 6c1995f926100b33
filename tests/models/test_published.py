"""Published models by name: from caches made here, as the libraries lay them out; the network is never asked."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders.model_files import FACTS, data_of
from builders.weights import randomised
from torch import Tensor, nn

from robust_prune.attacks.threat import ThreatModel
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.models import artifact
from robust_prune.models.foreign import open_model

IMAGENET = (0.485, 0.456, 0.406)
THOUSAND = FACTS | {"num_classes": 1000, "input_size": (3, 64, 64)}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Caches in a folder of the test, and an error for every connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("ROBUST_PRUNE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)
    yield


def put_on_hub(cache: Path, identifier: str, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
    folder = cache / ("models--" + identifier.replace("/", "--"))
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    safetensors.torch.save_file(weights, snapshot / "model.safetensors")
    if config is not None:
        (snapshot / "config.json").write_text(json.dumps(config))


def same(model: nn.Module, other: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: int) -> bool:
    x = torch.rand(2, 3, size, size)
    numbers = (torch.tensor(v)[:, None, None] for v in (mean, std))
    first, second = numbers
    with torch.no_grad():
        return torch.allclose(model(x), other.eval()((x - first) / second), atol=1e-4, rtol=1e-3)


def test_timm_by_name_with_its_own_normalization(tmp_path: Path) -> None:
    import timm

    made = randomised(timm.create_model("resnet10t"))
    put_on_hub(tmp_path / "hub", "timm/resnet10t.c3_in1k", made.state_dict())
    loaded = open_model("timm/resnet10t", data=data_of(THOUSAND))
    assert loaded.spec.mean == IMAGENET and not loaded.module.training
    assert same(loaded.module, made, IMAGENET, loaded.spec.std, 64)
    artifact.save(tmp_path / "a.safetensors", loaded.module, loaded.spec)
    assert artifact.load(tmp_path / "a.safetensors").spec.arch == "timm/resnet10t"


def test_a_model_on_the_hub_brings_its_architecture_arguments_and_normalization(tmp_path: Path) -> None:
    import timm

    arguments = {"img_size": 32, "depth": 1}
    made = timm.create_model("vit_tiny_patch16_224", num_classes=7, **arguments)
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 7}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": arguments}
    put_on_hub(tmp_path / "hub", "me/tiny", made.state_dict(), config | {"pretrained_cfg": pretrained})
    loaded = open_model("hf-hub:me/tiny", data=data_of())
    assert loaded.spec.arch == "timm/vit_tiny_patch16_224" and loaded.spec.kwargs == arguments
    assert same(loaded.module, made, (0.5,) * 3, (0.5,) * 3, 32)
    artifact.save(tmp_path / "a.safetensors", loaded.module, loaded.spec)
    assert same(artifact.load(tmp_path / "a.safetensors").module, made, (0.5,) * 3, (0.5,) * 3, 32)


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "torchvision/squeezenet1_1.IMAGENET1K_V1"])
def test_torchvision_by_name_with_a_choice_of_weights(tmp_path: Path, name: str) -> None:
    from torchvision import models

    made = models.squeezenet1_1()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(made.state_dict(), folder / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    loaded = open_model(name, data=data_of(THOUSAND))
    assert loaded.spec.arch == "torchvision/squeezenet1_1" and "weights" not in loaded.spec.kwargs
    assert same(loaded.module, made, IMAGENET, loaded.spec.std, 64)


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the package robustbench that are used, with its names and its folders."""
    import enum

    dataset = enum.Enum("BenchmarkDataset", {"cifar_10": "cifar10", "cifar_100": "cifar100"})  # type: ignore[misc]
    setting = enum.Enum("ThreatModel", {"Linf": "Linf", "L2": "L2"})  # type: ignore[misc]
    known = {"Small2020": {"model": Zoo, "gdrive_id": "x"}, "Deck": {"model": Zoo, "gdrive_id": ["x", "y"]}}

    def load_model(name: str, model_dir: Path, dataset: str, threat_model: str) -> nn.Module:
        model = Zoo()
        model.load_state_dict(torch.load(Path(model_dir) / dataset / threat_model / f"{name}.pt"))
        return model.eval()

    parts: dict[str, dict[str, Any]] = {
        "robustbench": {}, "robustbench.model_zoo": {}, "robustbench.utils": {"load_model": load_model},
        "robustbench.model_zoo.enums": {"BenchmarkDataset": dataset, "ThreatModel": setting},
        "robustbench.model_zoo.models": {"model_dicts": {dataset.cifar_10: {setting.Linf: known, setting.L2: known}}},
    }  # fmt: skip
    for name, values in parts.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


def test_robustbench_by_identifier_with_its_threat_model(tmp_path: Path, zoo: None) -> None:
    made = Zoo()
    folder = tmp_path / "models" / "cifar10" / "L2"
    folder.mkdir(parents=True)
    torch.save(made.state_dict(), folder / "Small2020.pt")
    data = data_of(FACTS | {"num_classes": 10})
    loaded = open_model("robustbench/cifar10/L2/Small2020", data=data)
    assert loaded.threat == ThreatModel("l2", 0.5)
    assert same(loaded.module, made, (0.0,) * 3, (1.0,) * 3, 32)
    artifact.save(tmp_path / "a.safetensors", loaded.module, loaded.spec, threat=loaded.threat)
    assert same(artifact.load(tmp_path / "a.safetensors").module, made, (0.0,) * 3, (1.0,) * 3, 32)
    with pytest.raises(EnvironmentProblem, match=r"cannot load Small2020 .*data/robustbench/cifar10/Linf/Small2020.pt"):
        open_model("robustbench/cifar10/Linf/Small2020", data=data)
    with pytest.raises(UsageError, match="has no model Smal2020 for cifar10 and L2"):
        open_model("robustbench/cifar10/L2/Smal2020", data=data)
    with pytest.raises(UsageError, match="Deck of RobustBench is an ensemble"):
        open_model("robustbench/cifar10/L2/Deck", data=data)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("timm/resnet10t", EnvironmentProblem, "are not on this machine, and https://.* cannot be reached"),
        ("torchvision/squeezenet1_1", EnvironmentProblem, "cannot download the published weights"),
        ("hf-hub:me/nothing", EnvironmentProblem, "are not on this machine, and https://.* cannot be reached"),
        ("timm/resnet10x", UsageError, "unknown architecture timm/resnet10x. Did you mean"),
        ("timm/test_vit5", UsageError, "unknown architecture timm/test_vit5"),
        ("torchvision/squeezenet1_1.V9", UsageError, "has no weights V9; it has IMAGENET1K_V1"),
        ("robustbench/Small2020", UsageError, "named as in robustbench/cifar10/Linf/Carmon2019Unlabeled"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(name: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as raised:
        open_model(name, data=data_of(THOUSAND))
    assert "\n" not in str(raised.value)


def test_other_classes_are_refused_with_the_way_to_train() -> None:
    with pytest.raises(
        UsageError, match=r"tell 1,000 classes apart, facts has 7.*robust-prune train --arch timm/resnet10t"
    ):
        open_model("timm/resnet10t", data=data_of())
