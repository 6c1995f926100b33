"""Single layers run in files of their own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from robust_prune.bench import layer_times
from robust_prune.bench.layer_times import layer_seconds
from robust_prune.budget.latency_cost import LayerShape

CONV = LayerShape((2, 6, 9, 9), (4, 6, 3, 3), (2, 2), (1, 1), (1, 1))
DEPTHWISE = LayerShape((1, 6, 9, 9), (6, 1, 5, 5), (1, 1), (2, 2), (1, 1), 6)
LINEAR = LayerShape((2, 7, 12), (5, 12))


def test_each_layer_has_a_time() -> None:
    found = layer_seconds([CONV, DEPTHWISE, LINEAR], "cpu", 1)
    assert len(found) == 3 and all(0 < seconds < 10 for seconds in found)


@pytest.mark.parametrize(("shape", "output"), [(CONV, [2, 4, 5, 5]), (DEPTHWISE, [1, 6, 9, 9]), (LINEAR, [2, 7, 5])])
def test_the_file_holds_the_layer(shape: LayerShape, output: list[int], tmp_path: object) -> None:
    ir.save(layer_times._model(shape), tmp_path / "layer.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "layer.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    images = session.get_inputs()[0]
    (found,) = session.run(None, {images.name: np.ones(shape.input, np.float32)})
    assert list(found.shape) == output and (found >= 0).all() and found.any()
