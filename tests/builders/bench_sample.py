"""Files to time, processes that are left over, and workers that only pretend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper


def classifier(path: Path, shape: list[Any] | None = None, inputs: int = 1, width: int = 4) -> Path:
    """A file that flattens [batch, 3, 8, 8] images and gives `width` logits."""
    shape = ["batch", 3, 8, 8] if shape is None else shape
    weight = np.random.default_rng(0).normal(size=(192, width)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x0"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    if inputs == 2:
        nodes[0] = helper.make_node("Flatten", ["sum"], ["flat"])
        nodes.insert(0, helper.make_node("Add", ["x0", "x1"], ["sum"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i in range(inputs)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], width])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def left_over() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


class FakeWorker:
    """Answers like a process; its runs get faster for `settles` windows, as a cold model's do."""

    visits: list[str]

    def __init__(self, label: str, settles: int = 0) -> None:
        self.label, self.settles, self.windows = label, settles, 0
        self.pid = os.getpid()

    def ask(self, op: str, runs: int = 0, wake: int = 0, **_: Any) -> dict[str, Any]:
        if op == "open":
            return {"provider": "CPUExecutionProvider"}
        if wake:
            FakeWorker.visits.append(self.label)
        self.windows += 1
        return {"ns": [1_000_000 * (1 + max(0, self.settles - self.windows))] * runs}
