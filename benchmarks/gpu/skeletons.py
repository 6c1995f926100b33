"""ONNX files without weights, which are small to copy and are filled with random weights where they are timed.

Tracing, pruning and exporting a model takes half a minute on one core, and latency does not depend on the weights as
long as none are subnormal. Therefore graphs are copied as they were exported and checked, and matrices and kernels are
drawn again.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

KEY = "skeleton"
LEAST_SIZE = 1024
_FLOATS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


def strip(source: Path, target: Path) -> None:
    """Write `source` to `target` without the values of large float matrices and kernels; vectors are kept."""
    model = onnx.load(source)
    emptied = []
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS and len(tensor.dims) >= 2 and np.prod(tensor.dims) >= LEAST_SIZE:
            emptied.append(tensor.name)
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
            tensor.ClearField("int32_data")
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(emptied)
    onnx.save(model, target)


def fill(source: Path, target: Path, seed: int = 0) -> None:
    """Write the skeleton `source` to `target` with the normal initialisation of He et al. (2015)."""
    model = onnx.load(source)
    generator = np.random.default_rng(seed)
    emptied = set(json.loads(next(entry.value for entry in model.metadata_props if entry.key == KEY)))
    for tensor in model.graph.initializer:
        if tensor.name in emptied:
            shape = tuple(tensor.dims)
            spread = np.sqrt(2 / max(1, np.prod(shape[1:])))
            values = (spread * generator.standard_normal(shape, dtype=np.float32)).astype(_FLOATS[tensor.data_type])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    del model.metadata_props[-1]
    onnx.save(model, target)
