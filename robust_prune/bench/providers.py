"""ONNX Runtime's execution providers: names, options, requirements, and diagnosis if one does not run.

This module imports only numpy and onnxruntime, since the worker processes of a benchmark must load nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

from ..errors import EnvironmentProblem
from ..machine.runtime import import_onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}
"""Device whose memory each provider uses."""


def provider_options(provider: str, precision: str, graph: bool) -> dict[str, str]:
    """Return ONNX Runtime's options of a provider that differ from the defaults.

    Args:
        provider: a key of `PROVIDERS`.
        precision: ``fp32``, ``fp16`` or ``int8``; TensorRT uses less than fp32 only if an option enables it.
        graph: whether runs are captured in a CUDA graph and replayed.
    """
    if provider == "cuda":
        return {"enable_cuda_graph": "1"} if graph else {}
    if provider == "tensorrt":
        chosen = {"trt_cuda_graph_enable": graph, "trt_fp16_enable": precision == "fp16"}
        return {key: "1" for key, wanted in {**chosen, "trt_int8_enable": precision == "int8"}.items() if wanted}
    return {}


def require(provider: str) -> None:
    """Raise EnvironmentProblem, with the reason, if a provider does not run on this machine."""
    problem = provider_problem(provider)
    if problem:
        raise EnvironmentProblem(f"provider {provider} was asked for, but {problem} Use provider cpu, or repair it.")


def provider_problem(provider: str) -> str:
    """Return why a provider does not run on this machine; empty if no problem was found.

    `onnxruntime.get_available_providers` lists the providers that the package was built with, not those that work.
    Therefore this function loads the driver and the provider's own library.

    Raises:
        EnvironmentProblem: onnxruntime cannot be imported.
    """
    ort = import_onnxruntime()
    if provider == "cpu":
        return ""
    kind = {"cuda": "CUDA", "tensorrt": "TensorRT"}[provider]
    if PROVIDERS[provider] not in ort.get_available_providers():
        return f"this onnxruntime was built without {kind}. Install onnxruntime-gpu in its place (never beside it)."
    if sys.platform == "darwin":
        return "macOS has no CUDA."
    windows = sys.platform == "win32"
    driver = _load_problem("nvcuda.dll" if windows else "libcuda.so.1")
    if driver:
        return f"there is no NVIDIA driver on this machine ({driver})."
    _preload(ort)
    name = f"onnxruntime_providers_{provider}.dll" if windows else f"libonnxruntime_providers_{provider}.so"
    missing = _load_problem(str(Path(ort.__file__).parent / "capi" / name))
    if "cannot open shared object file" in missing or "could not find" in missing.lower():
        package = "onnxruntime-gpu[cuda,cudnn]" if provider == "cuda" else "tensorrt"
        return f"a {kind} library is missing ({missing}). Try: pip install '{package}'."
    return ""


def _preload(ort: Any) -> None:
    """Load the CUDA and cuDNN libraries of NVIDIA's packages from anywhere on the Python path.

    ONNX Runtime itself searches only next to its own folder. The libraries are elsewhere if both were installed to
    different places (``pip install --target``, a virtual environment with the system's packages).
    """
    if not hasattr(ort, "preload_dlls"):
        return
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
        found = importlib.util.find_spec("nvidia")
        for root in (found.submodule_search_locations or ()) if found else ():
            for folder in sorted(Path(root).glob("*/lib")):
                ort.preload_dlls(directory=str(folder))


def _load_problem(library: str) -> str:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""
