"""Other people's checkpoints: every wrapping is opened, everything else is refused in one line."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.model_files import FACTS, MEAN, SMALL, STD, data_of, make_spec
from builders.weights import randomised
from torch import Tensor, nn
from torch.nn.utils import prune

from robust_prune.data.base import DataBundle, TensorImages
from robust_prune.errors import UsageError
from robust_prune.introspect.copies import copied
from robust_prune.models import cifar, registry
from robust_prune.models.artifact import Model
from robust_prune.models.foreign import open_model
from robust_prune.models.state_dict import find_weights


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


def two_sets(donor: nn.Module, path: Path, averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.save({"state_dict": dict(donor.state_dict()), "state_dict_ema": averaged, "optimizer": {"state": {}}}, path)
    return averaged


def test_averaged_weights_are_preferred_as_in_timm_and_the_others_named(tmp_path: Path, donor: nn.Module) -> None:
    averaged = two_sets(donor, tmp_path / "m.pt", {k: t * 2 for k, t in donor.state_dict().items()})
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert torch.equal(loaded.module.backbone.conv1.weight, averaged["conv1.weight"])
    assert loaded.provenance["weights_from"] == "state_dict_ema"
    assert "m.pt holds several sets of weights: state_dict_ema was taken, state_dict not." in loaded.provenance["notes"]


def test_averaged_weights_that_are_worse_on_the_images_are_not_taken(tmp_path: Path) -> None:
    labels = torch.arange(60) % 3
    part = TensorImages((labels * 100)[:, None, None, None].expand(60, 3, 4, 4).byte(), labels)
    data = DataBundle("shades", part, part, part, ("a", "b", "c"), (0.4,) * 3, (0.3,) * 3, (3, 4, 4))
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.c = nn.Parameter(torch.zeros(3))\n    def forward(self, x):\n"
        "        return -(x.mean((1, 2, 3))[:, None] - self.c).square()\n"
    )
    good = torch.tensor([0.0, 100 / 255, 200 / 255])
    torch.save({"state_dict": {"c": good}, "ema": {"c": torch.zeros(3)}}, tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=f"{tmp_path / 'net.py'}:Net", data=data)
    assert loaded.provenance["weights_from"] == "state_dict"
    assert "state_dict (100.0 %) was taken, ema (3" in loaded.provenance["notes"][-1]


def test_sets_under_prefixes_of_one_state_dict(tmp_path: Path, donor: nn.Module) -> None:
    averaged = {key: tensor * 2 for key, tensor in donor.state_dict().items()}
    stored = prefixed("net.", dict(donor.state_dict())) | prefixed("ema_net.module.", averaged)
    torch.save({"state_dict": stored | prefixed("attacker.net.", dict(donor.state_dict()))}, tmp_path / "m.ckpt")
    loaded = open_model(tmp_path / "m.ckpt", arch=SMALL, data=data_of())
    assert torch.equal(loaded.module.backbone.conv1.weight, averaged["conv1.weight"])
    said = "state_dict: ema_net.module. was taken, state_dict: net. not"
    assert any(said in note for note in loaded.provenance["notes"])


def test_what_belongs_to_training_alone_is_left_out_and_named(tmp_path: Path, donor: nn.Module) -> None:
    stored = prefixed("model.", dict(donor.state_dict())) | {
        "criterion.weight": torch.ones(7), "train_acc.correct": torch.tensor(3), "teacher.conv1.weight": torch.ones(4),
    }  # fmt: skip
    torch.save({"state_dict": stored, "epoch": 3, "pytorch-lightning_version": "2.5"}, tmp_path / "m.ckpt")
    loaded = open_model(tmp_path / "m.ckpt", arch=SMALL, data=data_of())
    assert same_as(loaded, donor)
    assert any("left out (criterion, teacher, train_acc)" in note for note in loaded.provenance["notes"])


def test_modules_that_forward_never_calls_may_be_missing_or_too_many(tmp_path: Path) -> None:
    wide = randomised(cifar.create("wideresnet_10_1", 7))
    dead = {f"sub_block1.{key}": tensor for key, tensor in wide.block1.state_dict().items()}
    torch.save({"state_dict": prefixed("module.", dict(wide.state_dict()) | dead)}, tmp_path / "trades.pt")
    loaded = open_model(tmp_path / "trades.pt", arch="cifar/wideresnet_10_1", data=data_of())
    assert same_as(loaded, wide)
    assert any("left out (sub_block1)" in note for note in loaded.provenance["notes"])
    torch.save(wide.state_dict(), tmp_path / "clean.pt")
    built = open_model(tmp_path / "clean.pt", arch="cifar/wideresnet_10_1", kwargs={"sub_block1": True}, data=data_of())
    assert any("parts that forward never calls" in note for note in built.provenance["notes"])


def test_masks_are_multiplied_into_the_weights(tmp_path: Path, donor: nn.Module) -> None:
    masked = copied(donor)
    prune.l1_unstructured(masked.conv1, "weight", 0.5)
    torch.save(masked.state_dict(), tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert torch.equal(loaded.module.backbone.conv1.weight, masked.conv1.weight)
    assert any("multiplied into the weights (50 % are 0)" in note for note in loaded.provenance["notes"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.onnx", b"\x08\x08", "is an ONNX file. Give the PyTorch weights"),
        ("m.npz", b"PK\x03\x04", "is a file of arrays. Give the PyTorch weights"),
        ("m.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Run git lfs pull"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        open_model(tmp_path / name, arch=SMALL, data=data_of())


def test_masks_beside_the_weights_are_multiplied_too(tmp_path: Path, donor: nn.Module) -> None:
    mask = (torch.rand(4, 3, 3, 3) > 0.5).float()
    torch.save({"state_dict": donor.state_dict(), "masks": {"conv1.weight": mask}}, tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert torch.equal(loaded.module.backbone.conv1.weight, donor.conv1.weight * mask)
    assert any("multiplied into the weights" in note for note in loaded.provenance["notes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: (t * 10).to(torch.int8), "conv1.weight is of type int8, where the model has floats"),
        (lambda t: t.to_sparse(), "conv1.weight is sparse"),
        (lambda t: t.to(torch.complex64), "conv1.weight is of type complex64"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, donor: nn.Module, change: Any, words: str) -> None:
    state = dict(donor.state_dict())
    torch.save(state | {"conv1.weight": change(state["conv1.weight"])}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match=words):
        open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())


def test_settings_of_the_training_script_name_the_normalization(tmp_path: Path, donor: nn.Module) -> None:
    settings = argparse.Namespace(lr=0.1, mean=(123.0, 117.0, 104.0), std=[58.0, 57.0, 57.5])
    torch.save({"state_dict": donor.state_dict(), "args": settings, "best": np.float64(0.5)}, tmp_path / "m.pt")
    loaded = open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert loaded.spec.mean == pytest.approx((123 / 255, 117 / 255, 104 / 255))
    assert "the settings in the checkpoint" in loaded.provenance["notes"][0]


@pytest.mark.parametrize(
    ("change", "words", "not_said"),
    [
        (lambda s: s | {"conv1.popup_scores": torch.ones(4, 3, 3, 3)}, "scores of a mask, as HYDRA and HARP", "--arch"),
        (lambda s: {k.replace("conv1.weight", "conv1.weight_v"): t for k, t in s.items()}, "reparametrized", "--arch"),
        (lambda s: s | {"conv1.weight": torch.ones(4, 1, 3, 3)}, "for images of 1 channels, the data have 3", "--arch"),
        (lambda s: s | {"projector.weight": torch.ones(2, 2)}, "differ in projector", "--arch"),
        (lambda s: {f"features.{k}": t for k, t in list(s.items())[:3]}, "tensors are missing", "widths"),
    ],
)  # fmt: skip
def test_the_hint_names_the_cause(tmp_path: Path, donor: nn.Module, change: Any, words: str, not_said: str) -> None:
    torch.save(change(dict(donor.state_dict())), tmp_path / "m.pt")
    with pytest.raises(UsageError, match=words) as raised:
        open_model(tmp_path / "m.pt", arch=SMALL, data=data_of())
    assert not_said not in str(raised.value).partition("missing")[2] and "\n" not in str(raised.value)


def test_a_position_embedding_of_another_size_names_both_sizes(tmp_path: Path) -> None:
    import timm

    data, kwargs = data_of(FACTS | {"input_size": (3, 64, 64)}), {"depth": 1}
    other = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=96, depth=1)
    torch.save(other.state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="for images of 96x96 pixels, the data have 64x64"):
        open_model(tmp_path / "m.pt", arch="timm/vit_tiny_patch16_224", data=data, kwargs=kwargs)


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
        (lambda *_: Path("timm/resnet18"), "names a published model, whose architecture is known. Leave --arch out"),
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


def test_a_dict_that_is_shared_many_times_is_looked_at_once(tmp_path: Path, donor: nn.Module) -> None:
    value: dict[str, Any] = dict(donor.state_dict())
    for _ in range(5):
        value = {f"part{number}": value for number in range(40)}
    torch.save(value, tmp_path / "shared.pt")
    begin = time.monotonic()
    assert len(find_weights(torch.load(tmp_path / "shared.pt", weights_only=True), "shared.pt")) == 1
    assert time.monotonic() - begin < 5
