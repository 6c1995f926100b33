"""Providers that do not run here are refused with the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from builders.bench_sample import classifier, left_over

from robust_prune.bench import providers, session
from robust_prune.bench.latency import run
from robust_prune.bench.session import open_session
from robust_prune.errors import EnvironmentProblem


def fake_onnxruntime(monkeypatch: pytest.MonkeyPatch, built: list[str], runs_on: list[str]) -> None:
    """An onnxruntime built with some providers, whose sessions run on others without a word."""
    import onnxruntime as real

    class Session(real.InferenceSession):
        def __init__(self, path: str, options: Any, providers: list[str], **_: Any) -> None:
            super().__init__(path, real.SessionOptions(), providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return runs_on

    fake = SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=real.SessionOptions,
        GraphOptimizationLevel=real.GraphOptimizationLevel,
        get_available_providers=lambda: built,
        __file__=real.__file__,
    )
    for module in (session, providers):
        monkeypatch.setattr(module, "import_onnxruntime", lambda: fake)


def test_cuda_without_a_gpu_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = classifier(tmp_path / "m.onnx")
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"

    fake_onnxruntime(monkeypatch, [cpu], [cpu])
    with pytest.raises(EnvironmentProblem, match="built without CUDA") as caught:
        open_session(path, "cuda", 1, 1)
    assert caught.value.exit_code == 3

    fake_onnxruntime(monkeypatch, [cuda, cpu], [cpu])
    monkeypatch.setattr(providers, "_load_problem", lambda name: "not found" if "cuda.so" in name else "")
    monkeypatch.setattr(providers.sys, "platform", "linux")
    with pytest.raises(EnvironmentProblem, match="no NVIDIA driver on this machine"):
        open_session(path, "cuda", 1, 1)

    missing = "libcublasLt.so.13: cannot open shared object file"
    monkeypatch.setattr(providers, "_load_problem", lambda name: missing if "providers_cuda" in name else "")
    with pytest.raises(EnvironmentProblem, match=r"libcublasLt\.so\.13.*onnxruntime-gpu\[cuda,cudnn\]"):
        open_session(path, "cuda", 1, 1)

    monkeypatch.setattr(providers, "_load_problem", lambda name: "")
    with pytest.raises(EnvironmentProblem, match=r"CUDAExecutionProvider was asked for.*fell back to CPUExec"):
        open_session(path, "cuda", 1, 1)

    fake_onnxruntime(monkeypatch, [cuda, cpu], [cuda, cpu])
    assert open_session(path, "cuda", 1, 1)[1].shape == (-1, 3, 8, 8)


def test_cuda_libraries_are_found_in_whichever_folder_of_the_path_nvidia_s_packages_lie(tmp_path, monkeypatch):
    for package in ("cu13", "cudnn"):
        (tmp_path / "nvidia" / package / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = []
    fake = SimpleNamespace(
        __file__=str(tmp_path / "elsewhere" / "__init__.py"),
        get_available_providers=lambda: ["CUDAExecutionProvider"],
        preload_dlls=lambda directory=None: asked.append(directory),
    )
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: fake)
    monkeypatch.setattr(providers, "_load_problem", lambda library: "")
    monkeypatch.setattr(providers.sys, "platform", "linux")
    assert providers.provider_problem("cuda") == ""
    assert asked[0] is None
    assert {str(tmp_path / "nvidia" / name / "lib") for name in ("cu13", "cudnn")} <= set(asked)


@pytest.mark.skipif(providers.provider_problem("cuda") == "", reason="this machine runs CUDA")
def test_cuda_is_refused_by_the_command_on_this_machine(tmp_path: Path) -> None:
    before = left_over()
    with pytest.raises(EnvironmentProblem, match="provider cuda was asked for, but"):
        run([("m", classifier(tmp_path / "m.onnx"))], provider="cuda")
    assert left_over() == before


def test_sessions_refuse_the_cpu_fallback_and_do_not_spin() -> None:
    import onnxruntime

    options = session._options(onnxruntime, "cuda", 3)
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 3


def test_broken_onnxruntime_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(EnvironmentProblem, match=r"without InferenceSession.*doctor"):
        providers.import_onnxruntime()


def test_tensorrt_is_refused_with_the_library_that_is_missing_and_told_of_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = classifier(tmp_path / "m.onnx")
    cpu, tensorrt = "CPUExecutionProvider", "TensorrtExecutionProvider"
    fake_onnxruntime(monkeypatch, [cpu], [cpu])
    with pytest.raises(EnvironmentProblem, match="built without TensorRT"):
        open_session(path, "tensorrt", 1, 1)
    fake_onnxruntime(monkeypatch, [tensorrt, cpu], [cpu])
    missing = "libnvinfer.so.10: cannot open shared object file"
    monkeypatch.setattr(providers, "_load_problem", lambda name: missing if "providers_tensorrt" in name else "")
    with pytest.raises(EnvironmentProblem, match=r"libnvinfer\.so\.10.*pip install 'tensorrt'"):
        open_session(path, "tensorrt", 1, 1)
    monkeypatch.setattr(providers, "_load_problem", lambda name: "")
    with pytest.raises(EnvironmentProblem, match=r"TensorrtExecutionProvider was asked for.*fell back to CPUExec"):
        open_session(path, "tensorrt", 1, 1)
    half = onnx.load(path)
    half.metadata_props.add(key="robust_prune", value=json.dumps({"precision": "fp16"}))
    onnx.save(half, path)
    assert open_session(path, "cpu", 1, 1)[1].precision == "fp16"
    assert providers.provider_options("tensorrt", "fp16", graph=False) == {"trt_fp16_enable": "1"}
    assert providers.provider_options("cuda", "fp16", graph=True) == {"enable_cuda_graph": "1"}
