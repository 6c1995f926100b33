"""Atomic writing of files, and hashes of values and files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import distributed
from ..errors import EnvironmentProblem, UsageError


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary file in the folder of `path`, then rename it to `path`.

    In a distributed run only the first process writes.

    Raises:
        EnvironmentProblem: the folder is not writable or the disk is full; the temporary file is removed.
    """
    if not distributed.is_first():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror}. Choose another --out.") from error
    part = Path(name)
    try:
        write(part)
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except Exception as error:
        # torch and safetensors raise errors of their own for a full disk.
        full = "inline_container" in str(error) or type(error).__name__ == "SafetensorError"
        if not (full or isinstance(error, OSError)):
            raise
        raise EnvironmentProblem(f"cannot write {path}: {error}. Free some space or choose another --out.") from error
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; see `atomic_write`."""
    atomic_write(path, lambda part: _plain_write(part, text))


def _plain_write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """Return the value with NaN and infinities replaced by None, since JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; see `atomic_write`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        UsageError: the file is missing or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


def digest(value: Any) -> str:
    """Return a hash of a JSON value, 16 hex digits of SHA-256, as the key of inputs."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
