"""Facts of the machine: GPU, clocks, copy bandwidth, bf16 matrix throughput, and the tests that need a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sizes import Sizes
from work import Work

from robust_prune.bench.providers import provider_problem
from robust_prune.machine import nvml
from robust_prune.machine.snapshot import snapshot

ROOT = Path(__file__).resolve().parents[3]


def run(work: Work, sizes: Sizes, deadline: float) -> None:
    """Measure bandwidth and throughput on random data, and run the GPU tests."""
    device, large = torch.device(sizes.device), sizes.device == "cuda"
    found: dict[str, Any] = {"environment": snapshot(), "gpus": nvml.gpus(), "before": nvml.states()}
    if large:
        properties = torch.cuda.get_device_properties(device)
        found["card"] = {
            "name": properties.name, "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    found["providers"] = {name: provider_problem(name) or "runs" for name in ("cpu", "cuda", "tensorrt")}
    size = 2**30 if large else 2**24
    source, target = torch.empty(2, size, dtype=torch.uint8, device=device).random_()
    seconds = _median(lambda: target.copy_(source), device)
    found["copy_gb_per_second"] = 2 * size / seconds / 1e9
    side = 8192 if large else 512
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    found["bf16_tflops"] = 2 * side**3 / _median(lambda: a @ b, device) / 1e12
    found["after"] = nvml.states()
    work.save("facts", found)
    found["gpu_tests"] = _gpu_tests(max(5.0, deadline - time.monotonic()))
    work.save("facts", found, "done")


def _median(call: Callable[[], object], device: torch.device, repeats: int = 12) -> float:
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times[2:])


def _gpu_tests(seconds: float) -> str:
    """Return the last lines of pytest for the tests that need a GPU; without a GPU they fail."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} s"
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return " | ".join([*failed, *lines[-1:]]) or done.stderr[-500:]
