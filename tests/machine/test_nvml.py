"""The protocol of timing, on workers that only pretend."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders.bench_sample import FakeWorker

from robust_prune.bench import sampler
from robust_prune.bench.sampler import Arm, Shape
from robust_prune.machine import nvml


class FakeNvml:
    """pynvml for one GPU: 2 joules more at every question."""

    NVMLError = OSError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 0, 1, 0
    spent = 0

    def __getattr__(self, name: str) -> Any:
        known = {
            "nvmlDeviceGetName": "H100",
            "nvmlSystemGetDriverVersion": b"580",
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetClockInfo": 1980,
        }
        if name == "nvmlDeviceGetPowerUsage":
            raise self.NVMLError("not supported")
        return lambda *_: known.get(name)

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**20), SimpleNamespace(pid=1, usedGpuMemory=9)]

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:  # noqa: N802
        self.spent += 2000
        return self.spent


def test_gpu_memory_clocks_and_energy_come_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())  # type: ignore[arg-type]
    assert nvml.memory_mib(os.getpid()) == 3 and nvml.memory_mib(-5) is None
    assert nvml.gpus() == [{"name": "H100", "driver": "580"}]
    assert nvml.states() == [{"sm_mhz": 1980, "memory_mhz": 1980, "celsius": None}]
    monkeypatch.setattr(
        sampler, "_workers", lambda labels, provider: contextlib.nullcontext([FakeWorker(label) for label in labels])
    )
    FakeWorker.visits = []
    gpu = Shape(batch=1, threads=1, provider="cuda", kind="device")
    (taken,) = sampler.measure([Arm("a", Path("x"))], gpu, 0.1, 0, energy=True)
    assert taken.joules == pytest.approx(2 / 3000)  # three seconds of runs of a millisecond
    assert taken.gpu_memory_mib == 3 and taken.memory_mib > 10
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.joules() is None and nvml.memory_mib(1) is None and nvml.states() == nvml.gpus() == []
