"""Latency of single layers, each in a file of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from ..budget.latency_cost import LayerShape
from ..console import track
from .session import open_session

SECONDS = 0.05
LEAST_RUNS = 50
"""Shortest time and number of runs of a file."""
_LEAST_SECONDS = 1e-7
_OPSET = 18


def layer_seconds(shapes: Sequence[LayerShape], provider: str, threads: int) -> list[float]:
    """Return the latency of each layer in seconds, in a file that holds it and a ReLU, less that of the smallest layer.

    Args:
        shapes: the layers.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: number of intra-op threads; 0 leaves them to ONNX Runtime.

    Raises:
        EnvironmentProblem: the provider does not run on this machine.
    """
    found = []
    smallest = LayerShape((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1))
    with TemporaryDirectory() as folder, track("Latency of single layers", len(shapes) + 1) as advance:
        for shape in (smallest, *shapes):
            file = Path(folder) / "layer.onnx"
            ir.save(_model(shape), file)
            found.append(file_seconds(file, shape.input, provider, threads))
            advance()
    overhead, *times = found
    return [max(each - overhead, _LEAST_SECONDS) for each in times]


def file_seconds(file: Path, shape: tuple[int, ...], provider: str, threads: int) -> float:
    """Return the latency of a file in seconds: the fastest of runs for `SECONDS`, at least `LEAST_RUNS`.

    Other work on the machine adds to every statistic but the fastest run, and more so to whole models than to layers.

    Args:
        file: the ONNX file.
        shape: shape of its input.
        provider, threads: as in `layer_seconds`.
    """
    session, given = open_session(file, provider, threads, shape[0])
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < LEAST_RUNS or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        session.run(None, {given.name: images})
        times.append(time.perf_counter() - start)
    return min(times)


def _model(shape: LayerShape) -> ir.Model:
    """Return an ONNX model of one layer with random weights, followed by a ReLU."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape.weight, dtype=np.float32) / math.sqrt(math.prod(shape.weight[1:]))
    x = ir.Value(name="x", shape=ir.Shape(shape.input), type=ir.TensorType(ir.DataType.FLOAT))
    if shape.stride:
        w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
        b = ir.Value(name="b", const_value=ir.tensor(np.zeros(shape.weight[0], np.float32), name="b"))
        attributes: dict[str, Any] = {
            "strides": shape.stride, "pads": (*shape.padding, *shape.padding), "dilations": shape.dilation,
            "group": shape.groups,
        }  # fmt: skip
        layer = ir.node("Conv", [x, w, b], attributes)
        weights = [w, b]
    else:
        w = ir.Value(name="w", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="w"))
        layer = ir.node("MatMul", [x, w])
        weights = [w]
    layer.outputs[0].name = "layer"
    relu = ir.node("Relu", [layer.outputs[0]])
    y = relu.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(_output(shape))
    graph = ir.Graph([x], [y], nodes=[layer, relu], initializers=weights, opset_imports={"": _OPSET}, name="layer")
    return ir.Model(graph, ir_version=9)


def _output(shape: LayerShape) -> tuple[int, ...]:
    if not shape.stride:
        return (*shape.input[:-1], shape.weight[0])
    sides = zip(shape.input[2:], shape.weight[2:], shape.stride, shape.padding, shape.dilation, strict=True)
    return (shape.input[0], shape.weight[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides))
