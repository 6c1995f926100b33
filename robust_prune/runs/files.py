"""Atomic writing of files, and hashes of values and files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from .. import distributed
from ..errors import EnvironmentProblem, UsageError

PART = ".part"
"""Suffix of temporary files."""
LONGEST_JSON = 30_000_000
"""Largest number of bytes of a JSON file that is read; a result has less than one million."""
_TEMPORARY = re.compile(rf"\..+\.\w{{8}}{re.escape(PART)}")


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary file in the folder of `path`, then rename it to `path`; see `atomic_writes`."""
    atomic_writes({path: write})


def atomic_writes(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write several files, or none of them if the contents of one cannot be written.

    Each function writes a temporary file beside its path. When all are on the disk, they are renamed one after the
    other. A link is kept, and the file behind it is written. A file keeps its permissions. In a distributed run only
    the first process writes.

    Raises:
        UsageError: a path is a folder, a device or a pipe, which would be replaced.
        EnvironmentProblem: a folder is not writable or the disk is full; the temporary files are removed.
    """
    if not distributed.is_first():
        return
    with ExitStack() as parts:
        done = [(_written(path, write, parts), path) for path, write in files.items()]
        for part, path in done:
            try:
                part.replace(os.path.realpath(path))
            except OSError as error:
                raise EnvironmentProblem(f"cannot write {path}: {error.strerror}. Choose another --out.") from error


def _written(path: Path, write: Callable[[Path], None], parts: ExitStack) -> Path:
    """Return the temporary file with the contents of `path`, which `parts` removes if it is still there."""
    check_replaceable(path)
    real = Path(os.path.realpath(path))
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{real.name}.", suffix=PART, dir=real.parent)
        os.close(handle)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror}. Choose another --out.") from error
    part = Path(name)
    parts.callback(part.unlink, missing_ok=True)
    try:
        write(part)
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
        part.chmod(stat.S_IMODE(real.stat().st_mode) if real.exists() else 0o666 & ~_umask())
    except Exception as error:
        # torch and safetensors raise errors of their own for a full disk, those of torch without a reason.
        torchs = any(sign in str(error) for sign in ("inline_container", "iostream error"))
        if not (torchs or isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
            raise
        why = "the disk is full, or the file too large" if torchs else error
        raise EnvironmentProblem(f"cannot write {path}: {why}. Free some space or choose another --out.") from error
    return part


def check_replaceable(path: Path) -> None:
    """Raise UsageError if `path` exists and is not a file, or a link to one: renaming would replace a device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise UsageError(f"{path} is {kind}, not a file. Name a file.")


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a run folder and the folders of its stages.

    No other process may be writing to the folder.
    """
    folders = [folder, *(path for path in folder.glob("*") if path.is_dir() and not (path / "run.json").exists())]
    for part in (path for place in folders for path in place.glob(f".*{PART}")):
        if part.is_file() and _TEMPORARY.fullmatch(part.name):
            part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; see `atomic_write`."""
    write_texts({path: text})


def write_texts(files: Mapping[Path, str]) -> None:
    """Write several files of UTF-8 text, or none of them; see `atomic_writes`."""
    atomic_writes({path: partial(_plain_write, text=text) for path, text in files.items()})


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
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return indented JSON."""
    return json.dumps(value, indent=1, allow_nan=True) + "\n"


def read_json(path: Path) -> Any:
    """Return the value of a JSON file of this package, which has at most `LONGEST_JSON` bytes.

    Raises:
        UsageError: the file is missing, is no file, is too long, or is not valid JSON.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"{path} does not exist") from error
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path} is no file")
    if found.st_size > LONGEST_JSON:
        raise UsageError(f"{path} has {found.st_size:,} bytes, which no file of robust-prune has")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


def digest(value: Any) -> str:
    """Return a hash of a JSON value, 16 hex digits of SHA-256, as the key of inputs."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
