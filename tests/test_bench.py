"""Latency: real processes on tiny files, and providers that do not run here."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from robust_prune.bench import latency, providers, sampler, session, statistics, worker
from robust_prune.bench.latency import render_latency, run
from robust_prune.bench.sampler import Arm, Shape
from robust_prune.bench.session import open_session
from robust_prune.bench.types import LatencyRow, LatencyTable, Ratio
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.serialization import from_json, to_json

CPU1 = Shape(batch=1, threads=1, provider="cpu", kind="host")


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "WARMUP_WINDOW_SECONDS", 0.002)
    monkeypatch.setattr(sampler, "VISIT_SECONDS", 0.001)


def left_over() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.usefixtures("quick")
def test_a_table_has_a_row_for_each_file_and_batch_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('the user s file was imported')")
    before = left_over()
    files = [("dense", classifier(tmp_path / "dense.onnx")), ("pruned", classifier(tmp_path / "pruned.onnx", width=2))]
    table = run(files, batches=(1, 3), seconds_budget=0.05, seed=1)
    assert [(row.label, row.batch) for row in table.rows] == [("dense", 1), ("pruned", 1), ("dense", 3), ("pruned", 3)]
    assert set(table.noise_floor) == {"batch 1 x 1 thread", "batch 3 x 1 thread"}
    for row in table.rows:
        assert row.provider == "CPUExecutionProvider" and row.kind == "host" and row.samples >= 12
        assert 0 < row.p50_low <= row.p50_ms <= row.p50_high
        assert row.images_per_second == pytest.approx(1000 * row.batch / row.p50_ms)
        assert (row.speedup is None) == (row.label == "dense")
        for q, least in statistics.MIN_SAMPLES.items():
            assert (getattr(row, f"p{q}_ms") is None) == (row.samples < least)
    assert from_json(LatencyTable, json.loads(json.dumps(to_json(table)))) == table
    assert table.environment["cpu"] and "onnxruntime" in " ".join(table.environment["versions"])
    assert str(tmp_path) not in json.dumps(table.environment)
    assert left_over() == before


def test_the_printed_table_fits_80_columns_and_says_none_inside_the_noise_floor() -> None:
    def row(label: str, ms: float, samples: int, speedup: Ratio | None) -> LatencyRow:
        tails = [2 * ms if samples >= least else None for least in statistics.MIN_SAMPLES.values()]
        ends = (1000 / ms, speedup, True)
        return LatencyRow(label, "x", "CPUExecutionProvider", "host", 1, 1, samples, ms, ms, ms, *tails, *ends, 5, 96.4)

    rows = (
        row("dense", 12.0, 700, None),
        row("pruned", 0.5, 140, Ratio(1.6, 1.56, 1.62, "faster")),
        row("copy", 1234.0, 700, Ratio(1.0, 0.99, 1.01, "no difference")),
    )
    out = io.StringIO()
    Console(file=out, width=80).print(
        render_latency(LatencyTable(rows, {"batch 1 x 1 thread": (1.1, 1.0, 1.2)}, {}, ""))
    )
    shown = out.getvalue()
    for text in (
        "dense*",
        "1.60x [1.56, 1.62]",
        "none [0.99, 1.01]",
        "12.0 [12.0, 12.0]",
        "1,234",
        "p95 ms",
        "pruned 96 MiB",
    ):
        assert text in shown, shown
    assert "p99 ms" not in shown and "…" not in shown
    assert "CPU host time, 1 thread. Noise floor (A/A): batch 1 x 1 thread: 1.100 [1.000," in " ".join(shown.split())
    assert "* noisy" in shown


def test_device_rows_run_on_bound_memory_and_give_the_same_logits(tmp_path: Path) -> None:
    opened, takes = open_session(classifier(tmp_path / "m.onnx"), "cpu", threads=1, batch=2)
    images = session.example(takes.batched(2, "m"), takes.dtype, seed=0)
    (logits,) = worker.runner(opened, takes.name, images, "host", "cpu")()
    run_bound, taken, (made,) = worker.bound(opened, takes.name, images, "cpu")
    run_bound()
    np.testing.assert_array_equal(made.numpy(), logits)
    taken.update_inplace(np.zeros_like(images))
    run_bound()
    np.testing.assert_array_equal(made.numpy(), opened.run(None, {takes.name: np.zeros_like(images)})[0])
    assert worker.runner(opened, takes.name, images, "device", "cpu")() is None


def test_a_graph_that_replays_old_inputs_is_refused(tmp_path: Path) -> None:
    """The CPU provider captures nothing: as it is, it is a sound graph; one that runs only once, a stale one."""
    opened, takes = open_session(classifier(tmp_path / "m.onnx"), "cpu", threads=1, batch=2)
    images, other = (session.example(takes.batched(2, "m"), takes.dtype, seed=seed) for seed in (0, 1))

    class Stale:
        ran = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(opened, name)

        def run_with_iobinding(self, binding: Any) -> None:
            if not self.ran:
                opened.run_with_iobinding(binding)
            self.ran += 1

    assert worker.replayed(opened, opened, takes.name, images, other, "cpu")() is None
    with pytest.raises(EnvironmentProblem, match=r"CUDA graph gives other logits.*kind device"):
        worker.replayed(opened, Stale(), takes.name, images, other, "cpu")


@pytest.mark.usefixtures("quick")
def test_a_worker_that_dies_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    before = left_over()
    path = classifier(tmp_path / "m.onnx")
    others = {p.pid for p in before}

    def kill_one(done: int, total: int) -> None:
        if done == 1:
            victim = next(p for p in psutil.Process().children() if p.pid not in others)
            os.kill(victim.pid, signal.SIGKILL)

    with pytest.raises(UsageError, match=r"the process that timed (a|b) was ended by signal 9 \(out of memory\?"):
        sampler.measure([Arm("a", path), Arm("b", path)], CPU1, 0.05, 0, kill_one)
    assert left_over() == before


@pytest.mark.usefixtures("quick")
def test_a_file_that_breaks_while_it_runs_is_refused(tmp_path: Path) -> None:
    before = left_over()
    path = classifier(tmp_path / "m.onnx")
    # Opens, but its Flatten and MatMul disagree about the image size.
    wrong = onnx.load(path)
    wrong.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 7
    onnx.save(wrong, path)
    with pytest.raises(UsageError):
        run([("m", path)], seconds_budget=0.01)
    assert left_over() == before


def test_files_that_are_no_classifiers_are_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure", lambda *_: pytest.fail("timed"))
    good = classifier(tmp_path / "good.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("this is text")
    cases: list[tuple[str, Path, tuple[int, ...], str]] = [
        ("a", tmp_path / "none.onnx", (1,), "does not exist"),
        ("a", tmp_path, (1,), "is no file"),
        ("a", text, (1,), "not an ONNX file"),
        ("a", classifier(tmp_path / "two.onnx", inputs=2), (1,), "one floating-point batch.*x0.*x1"),
        ("a", classifier(tmp_path / "free.onnx", ["batch", 3, "h", 8]), (1,), "only the batch may be free"),
        ("a", classifier(tmp_path / "fixed.onnx", [2, 3, 8, 8]), (2, 8), "batch 8 was asked.*batches of 2 only"),
        ("a", good, (0,), "batch must be whole numbers >= 1"),
    ]
    for label, path, batches, message in cases:
        with pytest.raises(UsageError, match=message):
            run([(label, path)], batches=batches)
    for arguments, message in [
        ({"provider": "tpu"}, "unknown provider 'tpu'"),
        ({"kinds": ("host", "fast")}, "unknown kind of row 'fast'"),
        ({"kinds": ("graph",)}, "graph replay CUDA graphs, which the cpu provider does not have"),
        ({"energy": True}, "energy is read from.*the provider is cpu"),
        ({"threads": ()}, "threads must be"),
    ]:
        with pytest.raises(UsageError, match=message):
            run([("a", good)], **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="own label"):
        run([("a", good), ("a", good)])
    with pytest.raises(UsageError, match="no ONNX file"):
        run([])


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


def test_the_worker_holds_no_torch_and_keeps_prints_out_of_its_answers(tmp_path: Path) -> None:
    code = "import sys, robust_prune.bench.worker; assert not {'torch', 'rich'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, json\nloads = json.loads\n"
        "def noisy(text, **kw):\n    print('a library prints')\n    return loads(text, **kw)\njson.loads = noisy\n"
    )
    request = {"op": "open", "path": str(classifier(tmp_path / "m.onnx")), "provider": "cpu", "threads": 1}
    done = subprocess.run(
        [sys.executable, "-m", "robust_prune.bench.worker"],
        input=json.dumps({**request, "batch": 1, "kind": "host", "seed": 0}) + "\n",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert json.loads(done.stdout)["shape"] == [1, 3, 8, 8]
    assert "a library prints" in done.stderr
