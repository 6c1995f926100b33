"""What a command says of an error that nothing before has turned into a message."""

from __future__ import annotations

import errno
import platform
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import EnvironmentProblem, RobustPruneError, UsageError

EXIT_CODE = 70
"""Exit status after an error in this package, EX_SOFTWARE of sysexits.h."""
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "failed to allocate memory", "bad_alloc",
                  "bad allocation", "out of memory", "can't start new thread", "failed to map segment",
                  "could not create a primitive")  # fmt: skip
"""What Python, torch, ONNX Runtime, the loader of libraries and oneDNN say."""


def explain(error: Exception) -> RobustPruneError | None:
    """Return the error as a message for users if the machine or a file is its cause, or None for an error of ours."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in said.lower() for sign in _OUT_OF_MEMORY):
        return EnvironmentProblem(
            f"the memory is not enough ({(said or type(error).__name__)[:120]}). Use smaller batches "
            "(evaluation.batch_size, finetune.batch_size), fewer images or a machine with more."
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError("a file name is too long. Give a shorter one.")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return EnvironmentProblem(f"{place}{error.strerror[:1].lower()}{error.strerror[1:]}.")
    return None


def keep_traceback(error: Exception, arguments: Sequence[str]) -> Path | None:
    """Write the traceback, with versions and command line, to a temporary file; None if that is not possible."""
    text = (
        f"robust-prune {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"arguments: {[*arguments]!a}\n\n{''.join(traceback.format_exception(error))}"
    )
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="robust-prune-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
    except OSError:
        return None
    return Path(file.name)
