"""Export: the file is the model, says what it is, holds no machine paths, and a wrong one is never kept."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders.export_sample import Small, images, small
from builders.places import ROOT
from onnx import numpy_helper
from torch import Tensor, nn

import robust_prune.exporters.onnx as export_module
from robust_prune.errors import EnvironmentProblem, QualityGateError, UsageError
from robust_prune.exporters.onnx import export_onnx, read_manifest
from robust_prune.exporters.parity import check_parity
from robust_prune.exporters.types import OnnxArtifact
from robust_prune.serialization import from_json, to_json


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_runs_alone_at_any_batch_and_gives_the_models_logits(exported: tuple[Small, Path, OnnxArtifact]) -> None:
    model, path, artifact = exported
    for batch in (1, 5, 32):
        x = images(batch)
        (logits,) = session(path).run(["logits"], {"images": x.numpy()})
        np.testing.assert_allclose(logits, model(x).detach().numpy(), atol=1e-5)
    assert artifact.parity.passed and artifact.parity.argmax_agreement == 1.0
    assert artifact.parity.batch_sizes == (1, 3, 8) and artifact.parity.images == 12
    assert artifact.bytes == path.stat().st_size and artifact.opset == 18
    assert from_json(OnnxArtifact, json.loads(json.dumps(to_json(artifact)))) == artifact


def test_the_file_needs_no_package_of_ours(exported: tuple[Small, Path, OnnxArtifact]) -> None:
    code = (
        "import sys, numpy as np, onnxruntime as ort; s = ort.InferenceSession(sys.argv[1]);"
        "print(s.run(None, {'images': np.zeros((32, 3, 16, 16), np.float32)})[0].shape);"
        "assert not {'torch', 'robust_prune'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(exported[1])], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(32, 5)", done.stderr


def test_one_file_with_a_manifest_and_no_paths_of_this_machine(exported: tuple[Small, Path, OnnxArtifact]) -> None:
    _, path, _ = exported
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    manifest = read_manifest(path)
    assert manifest["arch"] == "cifar/small" and manifest["output"]["class_names"] == list("abcde")
    assert manifest["input"] == {"name": "images", "layout": "NCHW", "range": [0, 1], "size": [3, 16, 16]}
    raw = path.read_bytes()
    for trace in (
        str(ROOT),
        str(Path(sys.prefix)),
        "site-packages",
        ".py",
        "stack_trace",
        "onnxscript",
    ):
        assert trace.encode() not in raw, trace
    onnx.checker.check_model(str(path), full_check=True)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_same_model_gives_the_same_bytes(exported: tuple[Small, Path, OnnxArtifact], tmp_path: Path) -> None:
    model, _, artifact = exported
    again = export_onnx(
        model,
        tmp_path / "again.onnx",
        images(),
        manifest={"arch": "cifar/small", "metrics": {"clean": 0.5}},
        class_names=list("abcde"),
    )
    assert again.sha256 == artifact.sha256


def test_train_mode_model_is_exported_in_eval_mode_and_left_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = small().train()
    model.norm.eval()
    model.to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_onnx(model, tmp_path / "m.onnx", images(), manifest={})
    assert capfd.readouterr() == ("", "")
    assert model.training and model.drop.training and not model.norm.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (logits,) = session(tmp_path / "m.onnx").run(None, {"images": images(4).numpy()})
    np.testing.assert_allclose(logits, small()(images(4)).detach().numpy(), atol=1e-5)


class AsksForFloat32(Small):
    """Names its type in the forward pass, as attention and positional code do."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.linspace(0.5, 1.5, 5, dtype=torch.float32)
        return super().forward(x.float()).to(torch.float32) @ torch.diag(scale) @ torch.eye(5)


def test_the_reference_stays_in_float64_when_the_model_asks_for_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = export_onnx(AsksForFloat32(), tmp_path / "m.onnx", images(), manifest={})
    assert artifact.parity.passed and 0 < artifact.parity.torch_error < 1e-5
    assert torch.get_default_dtype() == torch.float32


class BatchDependent(Small):
    """Folds the batch into the answer: right at the example's size of two, wrong at others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(2, -1).view(-1, 5) * (x.shape[0] if torch.compiler.is_exporting() else 2)


def test_a_file_that_differs_is_not_kept_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    torch.manual_seed(0)
    with pytest.raises(QualityGateError, match=r"not the same function.*float64 reference"):
        export_onnx(BatchDependent(), path, images(), manifest={})
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_subnormal_weights_are_flushed_and_counted(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.head.weight[0, :3] = torch.tensor([1e-40, -3e-39, 1e-45])
    artifact = export_onnx(model, tmp_path / "m.onnx", images(), manifest={})
    assert artifact.flushed_subnormals == 3
    for initializer in onnx.load(tmp_path / "m.onnx").graph.initializer:
        weight = numpy_helper.to_array(initializer)
        if weight.dtype == np.float32:
            assert not ((weight != 0) & (np.abs(weight) < np.finfo(np.float32).tiny)).any()


def test_large_weights_go_to_a_data_file_that_a_failed_export_does_not_touch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "MAX_EMBEDDED_BYTES", 1000)
    path = tmp_path / "model.onnx"
    model = small()
    artifact = export_onnx(model, path, images(), manifest={})
    assert artifact.parity.passed and artifact.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    files = sorted(p.name for p in tmp_path.iterdir())
    assert len(files) == 2 and files[1].endswith(".data")
    for seed in (0, 3):
        wrong = BatchDependent()
        wrong.load_state_dict(small(seed).state_dict())
        with pytest.raises(QualityGateError):
            export_onnx(wrong, path, images(), manifest={})
        assert sorted(p.name for p in tmp_path.iterdir()) == files
        assert check_parity(path, model, images()).passed
    export_onnx(small(3), path, images(), manifest={})
    assert check_parity(path, small(3), images()).passed
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("opset", [9, 17, 99])
def test_an_opset_that_cannot_be_written_is_refused(tmp_path: Path, opset: int) -> None:
    with pytest.raises(UsageError, match=rf"opset.*{opset}.*Try 18"):
        export_onnx(small(), tmp_path / "m.onnx", images(), manifest={}, opset=opset)
    assert not list(tmp_path.iterdir())


def test_a_newer_opset_is_honoured(tmp_path: Path) -> None:
    artifact = export_onnx(small(), tmp_path / "m.onnx", images(), manifest={}, opset=20)
    assert artifact.opset == 20 and onnx.load(tmp_path / "m.onnx").opset_import[0].version == 20


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images(8), "N >= 9"),
        (images(12) * 255, r"\[0, 1\].*Divide"),
        ((images(12) * 255).byte(), "float images"),
        (images(12) * float("nan"), r"in \[0, 1\]"),
        (images(12)[:, :2], "does not run"),
    ],
)
def test_unsuitable_images_are_refused(tmp_path: Path, bad: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_onnx(small(), tmp_path / "m.onnx", bad, manifest={})


def test_wrong_outputs_names_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="4 class names for a model with 5 logits"):
        export_onnx(small(), tmp_path / "m.onnx", images(), manifest={}, class_names=list("abcd"))
    with pytest.raises(UsageError, match=r"logits \[N, classes\]"):
        export_onnx(nn.Conv2d(3, 2, 1), tmp_path / "m.onnx", images(), manifest={})
    broken = small()
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(QualityGateError, match="NaN"):
        export_onnx(broken, tmp_path / "m.onnx", images(), manifest={})
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        export_onnx(small(), tmp_path / "file" / "m.onnx", images(), manifest={})
    (tmp_path / "bad.onnx").write_text("this is text")
    with pytest.raises(UsageError, match=r"cannot open bad\.onnx"):
        check_parity(tmp_path / "bad.onnx", small(), images())
    with pytest.raises(UsageError, match="not a readable ONNX file"):
        read_manifest(tmp_path / "bad.onnx")
    with pytest.raises(UsageError, match="does not exist"):
        read_manifest(tmp_path / "none.onnx")
