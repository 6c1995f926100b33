"""Hardware and system state of a latency measurement."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import psutil

from ..machine import host, nvml

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe(provider: str) -> dict[str, Any]:
    """Return processor, cores, memory, platform, versions and the values of `state`.

    For GPU providers the GPUs are included if nvidia-ml-py is installed. Values that the system does not provide are
    left out. Host names and paths are never included.

    Args:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
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
    """Return the current load, CPU clock in MHz and, for GPU providers, clocks, power and temperature of the GPUs."""
    facts: dict[str, Any] = {}
    load = load_average()
    if load is not None:
        facts["load_1_minute"] = load
    with contextlib.suppress(Exception):  # psutil raises errors of many kinds where system files are missing
        facts["cpu_mhz"] = round(psutil.cpu_freq().current)
    if provider != "cpu":
        facts["gpu_states"] = nvml.states()
    return facts


def load_per_core(facts: dict[str, Any]) -> float | None:
    """Return the smaller of the loads before and after a measurement, for each core; None if they are not known.

    What ran just before, such as a fine-tuning, is in the first for a minute; what runs beside is in both.

    Args:
        facts: what `describe` returned, with what `state` returned afterwards as ``after``.
    """
    before, after = facts.get("load_1_minute"), facts.get("after", {}).get("load_1_minute")
    return None if before is None or after is None else min(before, after) / max(facts["cores"], 1)


def load_average() -> float | None:
    """Return the number of runnable processes averaged over the last minute, or None if it is not available."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
