"""ONNX Runtime: its import, the memory that a file may take, and the messages of its errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..errors import EnvironmentProblem

FREE_BYTES, BYTES_OF_CORE, BYTES_OF_FILE, BYTES_OF_INPUT = 3 << 30, 256 << 20, 12, 1024
"""Address space for a file and its images: a fixed part, a part for the threads on each core, which
reserve more than they use, and multiples of the size of the file and of the images."""


def import_onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises:
        EnvironmentProblem: it is not installed, or broken by another build in the same folder.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentProblem(f"onnxruntime does not import: {error}. Run `robust-prune doctor`.") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise EnvironmentProblem(
            "onnxruntime is installed without InferenceSession: two of its builds share one folder and one was "
            "removed. `robust-prune doctor` prints the repair."
        )
    return onnxruntime


def limit_memory(path: Path, input_bytes: int = 0) -> None:
    """Let allocations of this process beyond what a sound ONNX file needs fail, where the system can do that.

    Args:
        path: the file.
        input_bytes: size of the batch that is about to run.
    """
    if sys.platform != "linux":
        return
    import resource

    import psutil

    needed = (
        FREE_BYTES
        + BYTES_OF_CORE * (os.cpu_count() or 1)
        + BYTES_OF_FILE * path.stat().st_size
        + BYTES_OF_INPUT * input_bytes
    )
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = psutil.Process().memory_info().vms + needed
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
