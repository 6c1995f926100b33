"""Our own model files: safe, whole, and rebuilt bit for bit."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders.model_files import FACTS, data_of, rewrite
from builders.weights import randomised
from torch import nn

from robust_prune.attacks.threat import ThreatModel
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.models import artifact, foreign, integrity, registry
from robust_prune.models.foreign import check_data, open_model
from robust_prune.models.manifest import describe_changes
from robust_prune.models.normalization import NormalizedClassifier
from robust_prune.models.spec import ModelSpec
from robust_prune.serialization import to_json

FIVE = FACTS | {"num_classes": 5}
USER_FILE = """
from torch import nn

def make(num_classes, ran=None):
    if ran:
        open(ran, "w").close()
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def make(arch: str = "cifar/resnet20_x0.25", **kwargs: Any) -> tuple[NormalizedClassifier, ModelSpec]:
    spec = registry.make_spec(arch, kwargs=kwargs, class_names=("a", "b", "c", "d", "e"), **FIVE)
    model = registry.build(spec)
    randomised(model)
    return model, spec


def cut_wide_resnet() -> tuple[NormalizedClassifier, ModelSpec]:
    """A WideResNet whose last stage lost channels: shapes and the stale attribute ``nChannels`` both change."""
    model, spec = make("cifar/wideresnet_10_1")
    keep = torch.tensor([0, 3, 5, 8, 13])
    net = model.backbone
    block = net.block3.layer[0]
    for conv in (block.conv2, block.convShortcut):
        conv.weight = nn.Parameter(conv.weight[keep].clone())
        conv.out_channels = len(keep)
    for name in ("weight", "bias"):
        setattr(net.bn1, name, nn.Parameter(getattr(net.bn1, name)[keep].clone()))
    for name in ("running_mean", "running_var"):
        setattr(net.bn1, name, getattr(net.bn1, name)[keep].clone())
    net.bn1.num_features = net.fc.in_features = net.nChannels = len(keep)
    net.fc.weight = nn.Parameter(net.fc.weight[:, keep].clone())
    return model, spec


def identical(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        outputs = torch.equal(one(x), other(x))
    return outputs and a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("maker", [make, cut_wide_resnet])
def test_round_trip_is_bit_identical(tmp_path: Path, suffix: str, maker: Any) -> None:
    model, spec = maker()
    path = tmp_path / f"model{suffix}"
    threat, provenance = ThreatModel("l2", 0.5), {"recipe": "abc", "metrics": {"clean": 0.8}}
    artifact.save(str(path), model, spec, threat=threat, provenance=provenance)
    loaded = artifact.load(str(path))
    assert identical(loaded.module, model)
    assert not loaded.module.training
    assert (loaded.spec, loaded.threat, loaded.provenance) == (spec, threat, provenance)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_given_changes_equal_those_worked_out(tmp_path: Path) -> None:
    model, spec = cut_wide_resnet()
    changes = describe_changes(registry.build(spec), model)
    assert changes["attributes"]["backbone"] == {"nChannels": 5}
    artifact.save(tmp_path / "a.safetensors", model, spec, changes=changes)
    artifact.save(tmp_path / "b.safetensors", model, spec)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_pruned_artifact_can_be_saved_again(tmp_path: Path) -> None:
    model, spec = cut_wide_resnet()
    artifact.save(tmp_path / "a.safetensors", model, spec)
    first = artifact.load(tmp_path / "a.safetensors")
    artifact.save(tmp_path / "b.pt", first.module, first.spec)
    assert identical(artifact.load(tmp_path / "b.pt").module, model)


def test_the_pt_variant_opens_without_pickle(tmp_path: Path) -> None:
    model, spec = make()
    artifact.save(tmp_path / "m.pt", model, spec)
    raw = torch.load(tmp_path / "m.pt", weights_only=True)
    assert json.loads(raw[artifact.KEY])["spec"]["arch"] == spec.arch
    assert raw["state_dict"].keys() == model.state_dict().keys()


def test_float16_storage_rounds_matrices_only_and_halves_the_file(tmp_path: Path) -> None:
    model, spec = make("cifar/resnet20")
    artifact.save(tmp_path / "full.safetensors", model, spec)
    artifact.save(tmp_path / "half.safetensors", model, spec, store_dtype="float16")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    rounded = artifact.load(tmp_path / "half.safetensors").module.state_dict()
    for key, tensor in model.state_dict().items():
        expected = tensor.half().float() if tensor.ndim >= 2 else tensor
        assert rounded[key].dtype == tensor.dtype and torch.equal(rounded[key], expected)


def test_float16_storage_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model, spec = make()
    with torch.no_grad():
        model.backbone.linear.weight[0, 0] = 1e6
    with pytest.raises(UsageError, match=r"linear.weight holds values beyond float16"):
        artifact.save(tmp_path / "m.safetensors", model, spec, store_dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_other_dtypes_tied_weights_and_channels_last_survive(tmp_path: Path) -> None:
    model, spec = make()
    block = model.backbone.layer1[0]
    block.conv2.weight = block.conv1.weight
    model.to(memory_format=torch.channels_last)
    model.backbone.linear.to(torch.bfloat16)
    for suffix in artifact.SUFFIXES:
        artifact.save(tmp_path / f"m{suffix}", model, spec)
        stored = artifact.load(tmp_path / f"m{suffix}").module.state_dict()
        assert all(torch.equal(stored[k], t) and stored[k].dtype == t.dtype for k, t in model.state_dict().items())


def test_the_request_to_download_weights_is_not_stored(tmp_path: Path) -> None:
    model, _ = make("timm/resnet10t")
    asking = registry.make_spec("timm/resnet10t", kwargs={"pretrained": True}, **FIVE)
    artifact.save(tmp_path / "m.safetensors", model, asking)
    loaded = artifact.load(tmp_path / "m.safetensors")
    assert loaded.spec.kwargs == {}
    assert identical(loaded.module, model)


def test_what_cannot_be_rebuilt_is_not_written(tmp_path: Path) -> None:
    model, _ = make()
    _, other = make("cifar/resnet20_x0.5")
    grown = registry.make_spec("cifar/vgg16_bn_x0.125", **FIVE)
    with pytest.raises(UsageError, match="does not fit its architecture"):
        artifact.save(tmp_path / "m.safetensors", model, other, changes={"attributes": {}, "shapes": {}})
    with pytest.raises(UsageError, match="exists in only one of the two models"):
        artifact.save(tmp_path / "m.safetensors", model, grown)
    with pytest.raises(UsageError, match="JSON"):
        artifact.save(tmp_path / "m.safetensors", model, make()[1], provenance={"tensor": torch.ones(1)})
    with pytest.raises(UsageError, match=r"ends in .safetensors or .pt"):
        artifact.save(tmp_path / "m.onnx", model, make()[1])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec = make()
    path = tmp_path / "m.safetensors"
    artifact.save(path, model, spec)
    before = path.read_bytes()

    def torn(tensors: Any, name: Any, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(path, model, spec)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ------------------------------------------------------------------------------------- damaged and hostile files


def rewritten(path: Path, **changes: Any) -> Path:
    """The same artifact with another manifest, whose hashes are right."""

    def edit(manifest: dict[str, Any], _: Any) -> None:
        manifest |= changes
        for key in [key for key, value in changes.items() if value == "gone"]:
            del manifest[key]

    return rewrite(path, edit)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 99}, "version 99.*Upgrade"),
        ({"spec": "gone"}, "manifest of .* is damaged"),
        ({"threat": {"norm": "l7"}}, "manifest of .* is damaged: .*norm: Input should be"),
        ({"threat": {"nonsense": 1}}, "manifest of .* is damaged"),
        ({"format": "something else"}, "is damaged"),
        ({"changes": {"attributes": {}, "shapes": {"backbone.conv1.weight": [1, 3, 3, 3]}}}, "does not fit"),
        ({"changes": {"attributes": {}, "shapes": {"backbone.conv1.weight": [999, 3, 3, 3]}}}, "not a cut of"),
        ({"changes": {"attributes": {"backbone": {"forward": "x"}}, "shapes": {}}}, "not a plain attribute"),
    ],
)
def test_damaged_manifests(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    model, spec = make()
    artifact.save(tmp_path / "m.safetensors", model, spec)
    with pytest.raises(UsageError, match=words) as raised:
        artifact.load(rewritten(tmp_path / "m.safetensors", **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", artifact.SUFFIXES)
def test_flipped_bits_are_found(tmp_path: Path, suffix: str) -> None:
    model, spec = make()
    path = tmp_path / f"m{suffix}"
    artifact.save(path, model, spec)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(40):
        bad = bytearray(whole)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            loaded = artifact.load(path).module
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert identical(loaded, model)  # padding, and checksums of the archive that torch does not read


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda _, tensors: tensors["backbone.conv1.weight"].mul_(1.001), "'backbone.conv1.weight' is not the one"),
        (lambda _, tensors: tensors.pop("backbone.bn1.bias"), "'backbone.bn1.bias' is missing"),
        (lambda manifest, _: manifest["spec"].update(class_names=["b", "a", "c", "d", "e"]), "not the one that was"),
        (lambda manifest, _: manifest["sha256"].update({"backbone.bn1.bias": "0" * 64}), "not the one that was"),
        (lambda manifest, _: manifest.pop("sha256"), "not the one that was"),
    ],
)
def test_what_was_changed_after_writing_is_refused(tmp_path: Path, edit: Any, words: str) -> None:
    model, spec = make()
    artifact.save(tmp_path / "m.safetensors", model, spec)
    with pytest.raises(UsageError, match=f"m.safetensors is damaged: .*{words}|{words}"):
        artifact.load(rewrite(tmp_path / "m.safetensors", edit, seal=False))


def test_files_without_hashes_still_open(tmp_path: Path) -> None:
    model, spec = make()
    artifact.save(tmp_path / "m.safetensors", model, spec)

    def older(manifest: dict[str, Any], _: Any) -> None:
        del manifest["sha256"], manifest[integrity.MANIFEST]
        manifest["version"] = 1

    assert identical(artifact.load(rewrite(tmp_path / "m.safetensors", older, seal=False)).module, model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "timm/vit_gigantic_patch14_224"}, "with 1,8.*weights and holds"),
        ({"arch": "cifar/wideresnet_70_16"}, "with 266,.*weights and holds"),
        ({"arch": "cifar/wideresnet_1000006_10"}, "with more than 2,000 parameters"),
        ({"arch": "cifar/resnet20_x99999"}, "weights and holds"),
        ({"num_classes": 10**8, "class_names": []}, "100,000,000 classes"),
        ({"num_classes": 10**6, "class_names": [], "arch": "cifar/vgg16_bn"}, "weights and holds"),
        ({"input_size": [3, 10**6, 10**6]}, "3x1000000x1000000 images"),
        ({"input_size": [3, 4096, 4096]}, "3x4096x4096 images"),
        ({"arch": "timm/vit_tiny_patch16_224", "kwargs": {"depth": 3_000_000}}, "with the number 3,000,000"),
        ({"mean": [float("nan")] * 3}, "mean"),
        ({"arch": "\x1b]0;title\x07x.py:f"}, r"control characters in '\\x1b\]0;title\\x07x"),
    ],
)
def test_small_files_cannot_ask_for_gigabytes(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    model, spec = make()
    artifact.save(tmp_path / "m.safetensors", model, spec)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=words):
        artifact.load(rewritten(tmp_path / "m.safetensors", spec=to_json(spec) | changes))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # a gigabyte


def test_truncated_artifacts(tmp_path: Path) -> None:
    model, spec = make()
    for suffix in artifact.SUFFIXES:
        path = tmp_path / f"m{suffix}"
        artifact.save(path, model, spec)
        whole = path.read_bytes()
        for share in (0.01, 0.3, 0.99):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(UsageError, match=r"damaged|incomplete|not a weight file|does not fit"):
                artifact.load(path)


def test_plain_weights_are_not_an_artifact(tmp_path: Path) -> None:
    model, _ = make()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="not a robust-prune artifact"):
        artifact.load(tmp_path / "m.pt")


def test_a_users_file_runs_only_when_the_user_names_it(tmp_path: Path) -> None:
    source = tmp_path / "my_model.py"
    source.write_text(USER_FILE)
    arch = f"{source}:make"
    model, spec = make(arch)
    path = tmp_path / "m.safetensors"
    artifact.save(path, model, spec)
    with pytest.raises(UsageError, match=f"add --arch {arch}"):
        artifact.load(path)
    assert identical(artifact.load(path, arch=arch).module, model)
    assert identical(artifact.load(path, known=spec).module, model)
    assert identical(open_model(path, arch=arch).module, model)

    moved = tmp_path / "elsewhere.py"
    source.rename(moved)
    assert artifact.load(path, arch=f"{moved}:make").spec.arch == f"{moved}:make"
    moved.write_text(USER_FILE.replace("3)", "5)"))
    with pytest.raises(UsageError, match="has changed"):
        artifact.load(path, arch=f"{moved}:make")


def test_an_artifact_cannot_pass_arguments_to_code_on_the_readers_disk(tmp_path: Path) -> None:
    source = tmp_path / "my_model.py"
    source.write_text(USER_FILE)
    model, spec = make()
    path = tmp_path / "m.safetensors"
    artifact.save(path, model, spec)
    ran = tmp_path / "ran"
    evil = to_json(spec) | {"arch": f"{source}:make", "kwargs": {"ran": str(ran)}, "source_sha256": "0" * 64}
    with pytest.raises(UsageError, match="runs that file"):
        artifact.load(rewritten(path, spec=evil))
    with pytest.raises(UsageError, match="is damaged: it lacks the hash of"):
        artifact.load(rewritten(path, spec=evil | {"source_sha256": ""}), arch=evil["arch"])
    assert not ran.exists()
    evil = to_json(spec) | {"arch": "timm/resnet10t", "kwargs": {"checkpoint_path": str(source)}}
    with pytest.raises(UsageError, match="read other files"):
        artifact.load(rewritten(path, spec=evil))


# ---------------------------------------------------------------------------------------------- through open_model


def test_demo_is_the_embedded_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec = make()
    monkeypatch.setattr(foreign.resources, "files", lambda _: tmp_path)
    with pytest.raises(EnvironmentProblem, match="Reinstall"):
        foreign.open_model("demo")
    artifact.save(tmp_path / "data" / "sample" / "demo.safetensors", model, spec)
    assert identical(foreign.open_model("demo").module, model)
    with pytest.raises(UsageError, match="Leave --arch out"):
        foreign.open_model("demo", arch="cifar/resnet20")


def test_artifacts_open_by_themselves_and_are_held_against_the_data(tmp_path: Path) -> None:
    model, spec = make()
    artifact.save(tmp_path / "m.pt", model, spec)
    other_statistics = FIVE | {"mean": (0.0, 0.0, 0.0)}
    loaded = open_model(tmp_path / "m.pt", data=data_of(other_statistics))
    assert identical(loaded.module, model)
    assert loaded.spec.mean == spec.mean
    with pytest.raises(UsageError, match="tells 5 classes apart, the data have 10"):
        open_model(tmp_path / "m.pt", data=data_of(FIVE | {"num_classes": 10}))
    with pytest.raises(UsageError, match=r"takes 3x32x32 images, the data have 1x28x28\. Greyscale"):
        check_data(spec, input_size=(1, 28, 28))
    with pytest.raises(UsageError, match=r"holds a cifar/resnet20_x0\.25, not cifar/resnet18"):
        open_model(tmp_path / "m.pt", arch="cifar/resnet18")
