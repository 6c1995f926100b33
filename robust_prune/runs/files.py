"""Files of a run: written whole or not at all, and stages that are skipped when their inputs have not changed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RunDir:
    """A run folder: ``runs/<name>/`` with a sub-folder a stage."""

    path: Path

    def stage(self, name: str) -> Path:
        """Folder of one stage (not created)."""
        return self.path / name

    def finished(self, stage: str, key: str) -> Any | None:
        """The stored outcome of `stage` if it was made from inputs with hash `key`, else None."""
        mark = self.stage(stage) / "stage.json"
        if not mark.exists():
            return None
        try:
            stored = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            return None
        return stored.get("outcome") if isinstance(stored, dict) and stored.get("key") == key else None

    def finish(self, stage: str, key: str, outcome: Any) -> None:
        """Marks `stage` as done for inputs `key`; write its files first."""
        write_json(self.stage(stage) / "stage.json", {"key": key, "outcome": outcome})


_WRITTEN = (
    "environment.json", "model.onnx", "model.safetensors", "recipe.yaml", "report.html", "result.csv", "result.json",
    "result.md",
)  # fmt: skip


def claim(folder: Path, key: str, command: str) -> str:
    """Makes `folder` the place of the run whose inputs have hash `key`; a second call with the same key is a resume.

    Raises:
        UsageError: the folder holds a run with other inputs or files of another origin that would be overwritten, or is
            a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file. Name a folder.")
    mark = folder / "run.json"
    if not mark.exists() and (others := sorted(name for name in _WRITTEN if (folder / name).exists())):
        raise UsageError(
            f"{folder} is not a run folder and holds {', '.join(others)}, which a run would overwrite. "
            "Name another folder with --out."
        )
    stored = read_json(mark) if mark.exists() else {"key": key}
    if not isinstance(stored, dict) or stored.get("key") != key:
        raise UsageError(
            f"{folder} holds a run with another model, data, recipe or version. "
            "Name another folder with --out, or remove it."
        )
    write_json(mark, {"key": key, "command": command})
    return key
