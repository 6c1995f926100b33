"""Other people's checkpoints: every wrapping is opened, everything else is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.model_files import MEAN, SMALL, STD, data_of, make_spec
from builders.weights import randomised
from torch import Tensor, nn

from robust_prune.errors import UsageError
from robust_prune.models import cifar, registry
from robust_prune.models.artifact import Model
from robust_prune.models.foreign import open_model


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    return randomised(cifar.create("resnet20_x0.25", 7))


def same_as(loaded: Model, donor: nn.Module) -> bool:
    theirs, ours = donor.state_dict(), loaded.module.backbone.state_dict()
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
    loaded = open_model(path, arch=SMALL, data=data_of())
    if wrapping != "no batch counters":
        assert same_as(loaded, donor)
    assert not loaded.module.training
    x = torch.rand(2, 3, 32, 32)
    normalized = (x - torch.tensor(MEAN)[None, :, None, None]) / torch.tensor(STD)[None, :, None, None]
    with torch.no_grad():
        assert torch.allclose(loaded.module(x), donor(normalized), rtol=1e-4)


def test_plain_safetensors_and_legacy_files(tmp_path: Path, donor: nn.Module) -> None:
    import safetensors.torch

    safetensors.torch.save_file(donor.state_dict(), tmp_path / "m.safetensors")
    torch.save(donor.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "old.pth"):
        assert same_as(open_model(tmp_path / name, arch=SMALL, data=data_of()), donor)


def test_normalization_inside_the_checkpoint_wins(tmp_path: Path, donor: nn.Module) -> None:
    stored = prefixed("model.", donor.state_dict())
    stored |= {"mu": torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), "sigma": torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)}
    torch.save(stored, tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert loaded.spec.mean == pytest.approx((0.1, 0.2, 0.3)) and loaded.spec.std == pytest.approx((0.9, 0.8, 0.7))
    assert loaded.module.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "a layer of the checkpoint" in loaded.provenance["notes"][0]
    assert same_as(loaded, donor)


def test_the_choice_between_weights_and_their_average_is_recorded(tmp_path: Path, donor: nn.Module) -> None:
    other = {key: torch.zeros_like(tensor) for key, tensor in donor.state_dict().items()}
    torch.save({"model": donor.state_dict(), "model_ema": other}, tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert same_as(loaded, donor)
    assert loaded.provenance["weights_from"] == "model"
    assert loaded.provenance["weights_not_used"] == ["model_ema"]


def test_a_users_model_with_a_plain_state_dict(tmp_path: Path, user_file: Path) -> None:
    spec = make_spec(f"{user_file}:make_model")
    state = randomised(registry.build(spec).backbone).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    loaded = open_model(tmp_path / "weights.pt", arch=f"{user_file}:make_model", data=data_of())
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.module.backbone.state_dict().items())
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
        open_model(path, arch=SMALL, data=data_of())
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert raised.value.exit_code == 2
    assert sorted(os.listdir(tmp_path)) == before


def test_foreign_weights_need_an_architecture_and_data(tmp_path: Path, donor: nn.Module) -> None:
    torch.save(donor.state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="Add --arch"):
        open_model(tmp_path / "m.pt", data=data_of())
    with pytest.raises(UsageError, match="must be known\. Give --data"):
        open_model(tmp_path / "m.pt", arch=SMALL)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Payload(tmp_path / "ran")}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="would run code"):
        open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert not (tmp_path / "ran").exists()


def test_pickled_modules_only_with_trust(tmp_path: Path, donor: nn.Module) -> None:
    torch.save({"model": nn.DataParallel(donor)}, tmp_path / "m.pt")
    assert same_as(open_model(tmp_path / "m.pt", arch=SMALL, trust_pickle=True, data=data_of()), donor)
    with pytest.raises(UsageError, match=r"holds a pickled module .* Add --arch"):
        open_model(tmp_path / "m.pt", trust_pickle=True, data=data_of())


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
    loaded = open_model(tmp_path / "cut.pt", arch=SMALL, trust_pickle=True, data=data_of())
    assert loaded.module.backbone.layer1[0].conv1.out_channels == 3
    assert same_as(loaded, cut)
