"""The gate: a file is held against float64."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from builders.export_sample import Small, images, small
from onnx import numpy_helper

from robust_prune.exporters.onnx import export_onnx
from robust_prune.exporters.parity import check_parity
from robust_prune.exporters.types import OnnxArtifact


def _with_changed_weight(source: Path, target: Path, scale: float) -> None:
    model = onnx.load(source)
    for initializer in model.graph.initializer:
        if initializer.name == "head.weight":
            weight = numpy_helper.to_array(initializer).copy()
            weight[0] *= scale
            initializer.CopyFrom(numpy_helper.from_array(weight, initializer.name))
    onnx.save(model, target)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (1.001, False), (-1.0, False)])
def test_a_weight_changed_on_purpose_fails_the_gate(
    exported: tuple[Small, Path, OnnxArtifact], tmp_path: Path, scale: float, passes: bool
) -> None:
    model, path, artifact = exported
    _with_changed_weight(path, tmp_path / "changed.onnx", scale)
    parity = check_parity(tmp_path / "changed.onnx", model, images())
    assert parity.passed is passes
    assert parity.torch_error == artifact.parity.torch_error
    if not passes:
        assert parity.onnx_error > 4 * parity.torch_error


def test_swapped_classes_show_in_the_agreement(exported: tuple[Small, Path, OnnxArtifact], tmp_path: Path) -> None:
    model, path, _ = exported
    wrong = onnx.load(path)
    for initializer in wrong.graph.initializer:
        if initializer.name.startswith("head."):
            flipped = numpy_helper.to_array(initializer)[::-1].copy()
            initializer.CopyFrom(numpy_helper.from_array(flipped, initializer.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    assert check_parity(tmp_path / "wrong.onnx", model, images()).argmax_agreement < 0.9


def test_tied_logits_count_as_agreement(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[:1].expand(5, -1).clone())
        model.head.bias.fill_(0.1)
    artifact = export_onnx(model, tmp_path / "tied.onnx", images(), manifest={})
    assert artifact.parity.argmax_agreement == 1.0
