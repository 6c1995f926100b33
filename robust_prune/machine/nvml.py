"""GPU names, clocks, memory and energy from the NVIDIA Management Library (NVML).

Without nvidia-ml-py or a driver the functions return empty results and raise nothing.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

MIB = 2**20


@contextlib.contextmanager
def _devices() -> Iterator[tuple[Any, list[Any]]]:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:
        yield None, []
        return
    try:
        yield nvml, [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def gpus() -> list[dict[str, str]]:
    """Return the name and the driver version of each GPU."""
    with _devices() as (nvml, devices):
        return [
            {"name": _text(nvml.nvmlDeviceGetName(device)), "driver": _text(nvml.nvmlSystemGetDriverVersion())}
            for device in devices
        ]


def _text(value: str | bytes) -> str:
    # Old releases of nvidia-ml-py return bytes.
    return value.decode() if isinstance(value, bytes) else value


def states() -> list[dict[str, float]]:
    """Return clocks in MHz, temperature in degrees Celsius and power in watts of each GPU, as far as available."""
    found = []
    with _devices() as (nvml, devices):
        for device in devices:
            facts: dict[str, Callable[[Any], float]] = {
                "sm_mhz": lambda d: nvml.nvmlDeviceGetClockInfo(d, nvml.NVML_CLOCK_SM),
                "memory_mhz": lambda d: nvml.nvmlDeviceGetClockInfo(d, nvml.NVML_CLOCK_MEM),
                "celsius": lambda d: nvml.nvmlDeviceGetTemperature(d, nvml.NVML_TEMPERATURE_GPU),
                "watts": lambda d: nvml.nvmlDeviceGetPowerUsage(d) / 1000,
            }
            state = {}
            for name, ask in facts.items():
                with contextlib.suppress(nvml.NVMLError):
                    state[name] = ask(device)
            found.append(state)
    return found


def joules() -> float | None:
    """Return the energy in joules used by all GPUs since the driver was loaded, or None without such a counter."""
    with _devices() as (nvml, devices):
        try:
            return sum(nvml.nvmlDeviceGetTotalEnergyConsumption(d) for d in devices) / 1000 if devices else None
        except nvml.NVMLError:
            return None


def memory_mib(pid: int) -> float | None:
    """Return the GPU memory of a process in MiB, or None if NVML does not report it (e.g. in a container)."""
    with _devices() as (nvml, devices):
        used = []
        for device in devices:
            with contextlib.suppress(nvml.NVMLError):
                running = nvml.nvmlDeviceGetComputeRunningProcesses(device)
                used += [p.usedGpuMemory for p in running if p.pid == pid and p.usedGpuMemory is not None]
        return sum(used) / MIB if used else None
