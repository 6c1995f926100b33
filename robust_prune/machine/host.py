"""Processor, memory, versions and commit of the machine, read without importing torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from ..machine import nvml

GIB = 2**30
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def platform_name() -> str:
    """Return the operating system, its release and the processor architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def cpu_name() -> str:
    """Return the processor's model name, or its architecture if the name is not available."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    if sys.platform == "darwin":
        name = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        if name:
            return name
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float:
    """Return the memory in GiB, or the container's limit if it is lower."""
    return round(min(psutil.virtual_memory().total, _container_limit()) / GIB, 1)


def _container_limit() -> float:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return float(int(Path(name).read_text(encoding="utf-8")))
    return float("inf")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those `packages` that are installed, by name."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str | None:
    """Return the commit of this package's git checkout, with ``+changes`` if files differ; None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+changes" if commit and changes else commit or None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def device_name() -> str:
    """Return the name of the GPU as reported by torch, if it is imported, else by NVML; ``cpu`` without a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
    found = nvml.gpus()
    return found[0]["name"] if found else "cpu"


def cpu_has_bf16() -> bool:
    """Return whether the processor has bf16 instructions; False on systems other than Linux."""
    with contextlib.suppress(OSError):
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
        return any(flag in words for flag in BF16_FLAGS)
    return False


def tune_allocator() -> bool:
    """Make glibc keep freed memory in the process, so that tensors of training steps cause no page faults.

    Returns:
        Whether the settings were accepted; False on systems other than Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    # Numbers of malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX.
    settings = {-1: 2**31 - 1, -2: 256 * 2**20, -4: 0}
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(key, value) == 1 for key, value in settings.items()])
