"""ONNX Runtime: its import, and the messages of its errors."""

from __future__ import annotations

from typing import Any

from ..errors import EnvironmentProblem


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


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
