"""The exported file is scored on the model's own adversarial images."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from builders.evaluation_sample import (
    CLASSES,
    THREAT,
    DiesAfter,
    KilledError,
    Tiny,
    evaluated,
    same_but_for_time,
)
from onnx import TensorProto, helper
from torch import Tensor

from robust_prune.data.base import TensorImages
from robust_prune.errors import UsageError
from robust_prune.evaluation.onnx_scores import OnnxModel


@pytest.fixture(scope="module")
def onnx_file(trained: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    torch.onnx.export(
        trained, (torch.rand(2, 3, 8, 8),), str(path), dynamo=True, dynamic_shapes=({0: "batch"},),
        external_data=False, verbose=False,
    )  # fmt: skip
    return path


def test_the_file_is_scored_on_the_worst_points_of_its_model(
    trained: Tiny, images: TensorImages, onnx_file: Path, tmp_path: Path
) -> None:
    exported_model = OnnxModel(onnx_file)
    settings = {"steps": 5, "batch_size": 64}
    result = evaluated(trained, images, THREAT, **settings, exported={"fp32": exported_model})
    assert result.exported["fp32"].clean == result.clean
    assert abs(result.exported["fp32"].robust.correct - result.robust.correct) <= 1
    assert result.flags == ()

    class Backwards(OnnxModel):
        def predict(self, images: Tensor) -> Tensor:
            return (super().predict(images) + 1) % CLASSES

    exported = {"fp32": exported_model, "int8": Backwards(onnx_file)}
    wrong = evaluated(trained, images, THREAT, **settings, exported=exported)
    assert "The int8 file and the torch model disagree on 100.0 % of clean images (limit 0.5 %)." in wrong.flags
    assert not any("fp32" in flag for flag in wrong.flags)
    assert wrong.exported["int8"].robust.value < 0.5 and wrong.exported["fp32"] == result.exported["fp32"]


def test_file_figures_survive_a_kill(trained: Tiny, images: TensorImages, onnx_file: Path, tmp_path: Path) -> None:
    settings = {"steps": 5, "batch_size": 32, "exported": {"fp32": OnnxModel(onnx_file)}}
    model = DiesAfter(trained).eval()
    whole = evaluated(model, images, THREAT, **settings)
    model.calls[0] = 60
    with pytest.raises(KilledError):
        evaluated(model, images, THREAT, **settings, state_path=tmp_path / "state.npz")
    model.calls[0] = 10**9
    resumed = evaluated(model, images, THREAT, **settings, state_path=tmp_path / "state.npz")
    assert same_but_for_time(whole, resumed)
    assert whole.exported == resumed.exported


def test_files_that_cannot_be_scored(trained: Tiny, images: TensorImages, onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(UsageError, match="cannot be read as an ONNX model"):
        OnnxModel(tmp_path / "text.onnx")
    with pytest.raises(UsageError, match=r"does not run on images of \(1, 3, 5\)"):
        OnnxModel(onnx_file).logits(torch.zeros(2, 3, 5))
    proto = onnx.load(onnx_file)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, tmp_path / "one.onnx")
    with pytest.raises(UsageError, match=r"takes batches of 1 only.*Export it with a dynamic batch"):
        OnnxModel(tmp_path / "one.onnx")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_file_whose_memory_grows_faster_than_its_batch_is_stopped(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Mul", ["count", "count"], ["square"]),
        helper.make_node("Mul", ["square", "many"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["filler"]),
        helper.make_node("ReduceSum", ["filler"], ["sum"], keepdims=1),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Add", ["flat", "sum"], ["logits"]),
    ]
    constants = {"first": [0], "many": [50_000_000]}
    graph = helper.make_graph(
        nodes, "growing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12])],
        [helper.make_tensor(name, TensorProto.INT64, [1], value) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "g.onnx")
    model = OnnxModel(tmp_path / "g.onnx")
    assert model.logits(torch.zeros(1, 3, 2, 2)).shape == (1, 12)
    with pytest.raises(UsageError, match="does not run on images"):
        model.logits(torch.zeros(32, 3, 2, 2))  # 205 GB
