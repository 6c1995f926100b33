"""Files of lower precision: they run alone, keep float32 at both ends, and a broken one is never kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders.export_sample import Small, images, small
from torch import nn

from robust_prune.errors import EnvironmentProblem, QualityGateError, UsageError
from robust_prune.exporters import precision as module
from robust_prune.exporters.onnx import MANIFEST_KEY, export_onnx, read_manifest
from robust_prune.exporters.precision import export_reduced
from robust_prune.exporters.types import OnnxArtifact
from robust_prune.serialization import from_json, to_json


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, Path]:
    model = small()
    path = tmp_path_factory.mktemp("precision") / "model.onnx"
    export_onnx(model, path, images(), manifest={"arch": "cifar/small"}, class_names=list("abcde"))
    return model, path


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.75), ("int8", 0.95)])
def test_a_reduced_file_runs_at_any_batch_and_stays_close(
    source: tuple[Small, Path], tmp_path: Path, precision: str, share: float
) -> None:
    model, fp32 = source
    path = tmp_path / f"model.{precision}.onnx"
    found = export_reduced(fp32, path, precision, model, images(64))
    assert from_json(OnnxArtifact, json.loads(json.dumps(to_json(found)))) == found
    assert found.precision == precision and found.parity.passed and found.bytes == path.stat().st_size
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"
    with torch.inference_mode():
        exact = model(images(40))
    for batch in (1, 5, 40):
        logits = session.run(None, {"images": images(40)[:batch].numpy()})[0]
        assert np.abs(logits - exact[:batch].numpy()).max() < 0.1 * float(exact.std())
    manifest = read_manifest(path)
    assert manifest["precision"] == precision and manifest["arch"] == "cifar/small"
    stored = onnx.load(path)
    assert [entry.key for entry in stored.metadata_props] == [MANIFEST_KEY]
    assert str(tmp_path) not in str(stored) and str(fp32.parent) not in str(stored)


def test_int8_holds_int8_weights_by_channel(source: tuple[Small, Path], tmp_path: Path) -> None:
    model, fp32 = source
    export_reduced(fp32, tmp_path / "a.onnx", "int8", model, images(32))
    stored = onnx.load(tmp_path / "a.onnx")
    weights = [t for t in stored.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert sorted(w.dims[0] for w in weights) == [12, 12]
    largest = max(np.abs(onnx.numpy_helper.to_array(w).astype(int)).max() for w in weights)
    assert 60 <= largest <= 64, "on CPUs without VNNI products of larger weights saturate"
    kinds = {node.op_type for node in stored.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_the_same_file_twice(source: tuple[Small, Path], tmp_path: Path) -> None:
    model, fp32 = source
    for precision in ("fp16", "int8"):
        one, two = (export_reduced(fp32, tmp_path / f"{n}.onnx", precision, model, images(32)) for n in "ab")
        assert one.sha256 == two.sha256


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_file_of_another_model_is_not_kept(source: tuple[Small, Path], tmp_path: Path, precision: str) -> None:
    _, fp32 = source
    path = tmp_path / "out.onnx"
    path.write_bytes(b"the old one")
    with pytest.raises(QualityGateError, match=f"the {precision} file gives the model's class on .* It was not kept"):
        export_reduced(fp32, path, precision, small(seed=5), images(64))
    assert path.read_bytes() == b"the old one" and [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_values_beyond_half_precision_are_caught(tmp_path: Path) -> None:
    """Logits of 1e6 are infinite in fp16: the gate must see it, whatever the conversion says."""

    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) * 1e6

    model = Huge().eval()
    export_onnx(model, tmp_path / "huge.onnx", images(), manifest={})
    with pytest.raises(QualityGateError, match="fp16 file"):
        export_reduced(tmp_path / "huge.onnx", tmp_path / "half.onnx", "fp16", model, images())
    assert not (tmp_path / "half.onnx").exists()


def test_requests_that_cannot_be_met(
    source: tuple[Small, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fp32 = source
    with pytest.raises(UsageError, match="precision must be one of fp16, int8, got 'int4'"):
        export_reduced(fp32, tmp_path / "a.onnx", "int4", model, images())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"does not exist. Export the model in fp32 first"):
        export_reduced(tmp_path / "absent.onnx", tmp_path / "a.onnx", "fp16", model, images())
    monkeypatch.setattr(module, "MAX_EMBEDDED_BYTES", 100)
    with pytest.raises(UsageError, match=r"above 1.8 GB"):
        export_reduced(fp32, tmp_path / "a.onnx", "fp16", model, images())
    monkeypatch.undo()
    (tmp_path / "broken.onnx").write_bytes(fp32.read_bytes()[:200])
    with pytest.raises(EnvironmentProblem, match=r"cannot convert broken.onnx to int8"):
        export_reduced(tmp_path / "broken.onnx", tmp_path / "a.onnx", "int8", model, images())
