"""What a latency was measured on: it means nothing without the machine and the machine's state."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import psutil

from ..machine import host, nvml

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe(provider: str) -> dict[str, Any]:
    """Processor, cores, clock, load and versions; unless for ``cpu`` the GPU too, when nvidia-ml-py is installed.

    Values that the system does not tell are left out. No host names and no paths.
    """
    facts: dict[str, Any] = {
        "cpu": host.cpu_name(),
        "cores": host.usable_cores(),
        "memory_gib": host.memory_gib(),
        "platform": host.platform_name(),
        "versions": host.versions(("onnxruntime", "onnxruntime-gpu", "numpy")),
    }
    facts |= state(provider)
    with contextlib.suppress(OSError):
        facts["governor"] = GOVERNOR.read_text(encoding="utf-8").strip()
    if provider != "cpu":
        facts["gpus"] = nvml.gpus()
    return facts


def state(provider: str) -> dict[str, Any]:
    """What changes by the minute: load, the processor's clock in MHz, the GPUs' clocks, power and temperature."""
    facts: dict[str, Any] = {}
    load = load_average()
    if load is not None:
        facts["load_1_minute"] = load
    with contextlib.suppress(Exception):  # psutil raises what the system's files make it raise
        facts["cpu_mhz"] = round(psutil.cpu_freq().current)
    if provider != "cpu":
        facts["gpu_states"] = nvml.states()
    return facts


def load_average() -> float | None:
    """Runnable processes averaged over the last minute, or None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
