"""Files that are written whole or not at all, and hashes of values and files."""

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
    """Lets `write` fill a temporary neighbour of `path`, then renames it over `path`.

    Of several processes only the first one writes.

    Raises:
        EnvironmentProblem: the folder is not writable or the disk is full; nothing is left behind.
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
        # torch and safetensors have errors of their own for a full disk.
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
    """Writes UTF-8 text atomically."""
    atomic_write(path, lambda part: _plain_write(part, text))


def _plain_write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has no such numbers and other readers refuse them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, indented."""
    write_text(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UsageError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


def digest(value: Any) -> str:
    """A short hash of a JSON value: the key of a stage's inputs."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
