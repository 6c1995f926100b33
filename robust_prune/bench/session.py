"""ONNX Runtime sessions that are verified to run on the requested execution provider.

This module imports only numpy and onnxruntime, since the worker processes of a benchmark must load nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EnvironmentProblem, UsageError
from ..exporters.types import MANIFEST_KEY
from ..machine.runtime import first_line, import_onnxruntime
from .providers import PROVIDERS, provider_options, require

DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


@dataclass(frozen=True)
class Signature:
    """Input of a classifier file.

    Attributes:
        name: name of its only input.
        dtype: numpy name of the input's data type.
        shape: shape of the input; the first dimension is -1 if the batch size is dynamic.
        symbol: name of the dynamic batch dimension in the file; empty if it has none.
        precision: ``fp16`` or ``int8`` if our manifest in the file says so, else ``fp32``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    symbol: str = ""
    precision: str = "fp32"

    def batched(self, batch: int, label: str) -> tuple[int, ...]:
        """Return the input's shape at a batch size; `label` names the file in the message.

        Raises:
            UsageError: the file has another, fixed batch size.
        """
        if self.shape[0] not in (-1, batch):
            raise UsageError(
                f"batch {batch} was asked for, but {label} takes batches of {self.shape[0]} only. "
                f"Use --batch {self.shape[0]} or export it with a dynamic batch."
            )
        return (batch, *self.shape[1:])


def open_session(path: Path, provider: str, threads: int, batch: int, *, graph: bool = False) -> tuple[Any, Signature]:
    """Open a file on one execution provider, without the fallback of single nodes to the CPU.

    Args:
        path: the ONNX file.
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        threads: number of intra-op threads; they do not spin, so that an idle session does not slow down others. 0
            leaves threads and spinning to ONNX Runtime.
        batch: fixed value of a dynamic batch size, so that arithmetic on shapes is folded and does not run on the CPU.
        graph: whether runs on bound memory are captured in a CUDA graph and replayed.

    Returns:
        The `onnxruntime.InferenceSession` and the signature of the file.

    Raises:
        UsageError: the provider is unknown, or the file is missing, is not an ONNX file, is not a classifier of images
            of one fixed size, has another fixed batch size, or does not run on the CPU.
        EnvironmentProblem: the provider does not run on this machine, or not all nodes run on it.
    """
    ort = import_onnxruntime()
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}. Choose one of: {', '.join(PROVIDERS)}.")
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is no file")
    require(provider)
    found = signature(ort, path)
    found.batched(batch, path.name)
    wanted, chosen = PROVIDERS[provider], provider_options(provider, found.precision, graph)
    options = _options(ort, provider, threads)
    if found.symbol:
        options.add_free_dimension_override_by_name(found.symbol, batch)
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted], provider_options=[chosen])
    except Exception as error:
        if provider == "cpu":
            raise UsageError(f"ONNX Runtime cannot run {path.name}: {first_line(error)}") from error
        raise EnvironmentProblem(
            f"{path.name} does not run wholly on {wanted}: {first_line(error)} Use provider cpu to measure the CPU."
        ) from error
    if session.get_providers()[0] != wanted:
        raise EnvironmentProblem(
            f"{wanted} was asked for, but ONNX Runtime fell back to {', '.join(session.get_providers())}. "
            "`robust-prune doctor` says what is missing."
        )
    return session, found


def signature(ort: Any, path: Path) -> Signature:
    """Return the signature of a file, read in a session on the CPU.

    Args:
        ort: the onnxruntime module.
        path: the ONNX file.

    Raises:
        UsageError: the file is not an ONNX file, or not a classifier of images of one fixed size.
    """
    options = _options(ort, "cpu", 1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=[PROVIDERS["cpu"]])
    except Exception as error:
        raise UsageError(f"{path} is not an ONNX file that ONNX Runtime can open: {first_line(error)}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in DTYPES or len(inputs[0].shape) < 2:
        listed = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise UsageError(f"{path} must take one floating-point batch of images, but its inputs are: {listed or 'none'}")
    free, *rest = inputs[0].shape
    if not all(isinstance(size, int) for size in rest):
        raise UsageError(
            f"{path} takes {inputs[0].shape}: only the batch may be free. Export it with a fixed image size."
        )
    shape = (free if isinstance(free, int) else -1, *rest)
    symbol = free if isinstance(free, str) else ""
    return Signature(inputs[0].name, DTYPES[inputs[0].type], shape, symbol, _precision(session))


def _precision(session: Any) -> str:
    stored = session.get_modelmeta().custom_metadata_map.get(MANIFEST_KEY, "")
    try:
        return str(json.loads(stored).get("precision", "fp32"))
    except (ValueError, AttributeError):
        return "fp32"


def example(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Return uniform random pixels in [0, 1)."""
    return np.random.default_rng(seed).random(shape).astype(dtype)


def _options(ort: Any, provider: str, threads: int) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        for key in ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning"):
            options.add_session_config_entry(key, "0")
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options
