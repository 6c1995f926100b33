"""Results that depend on a model and images alone, stored once and shared by all runs and commands.

An entry is a folder named by the hash of all that its result depends on: the caller's inputs, the code of this package,
the libraries and the machine. Its record carries its own hash and those of its files, which are checked on use; a
damaged entry is removed and its result computed again. Where all entries together exceed the limit, those that were not
used for longest are removed.

A run never fails because of its cache: where it cannot be read or written, results are computed again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import __version__
from ..console import WORTH_A_LINE, console, warn
from ..errors import RobustPruneError, UsageError
from ..machine import host
from ..printable import printable
from ..serialization import from_json, to_json
from .files import LONGEST_JSON, digest, file_sha256, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

LIMIT = 4 << 30
"""Bytes of all entries together; an entry that exceeds an eighth of it is not stored."""
NOTHING = "none"
"""Name of the cache that stores nothing."""
_FORMAT = 1
_PART = 8
_RECORD, TENSORS, _STAGES = "entry.json", "tensors.safetensors", "stages"
_ENTRY = re.compile(r"[0-9a-f]{16}")
_TEMPORARY = ".part"
_ABANDONED = 24 * 3600
"""Seconds after which a temporary folder belongs to a process that was killed."""
_LIBRARIES = (
    "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
)  # fmt: skip


def cache_folder(name: str | Path | None = None) -> Path | None:
    """Return a folder of cached values, or None if there is to be none.

    Args:
        name: the folder, or ``none``. By default the environment variable ``ROBUST_PRUNE_CACHE`` names one of them; if
            it is not set, the folder is ``~/.cache/robust-prune``.

    Raises:
        UsageError: the name begins with the home of an unknown user.
    """
    chosen = str(name or os.environ.get("ROBUST_PRUNE_CACHE") or Path("~", ".cache", "robust-prune"))
    try:
        return None if chosen == NOTHING else Path(chosen).expanduser()
    except RuntimeError as error:
        raise UsageError(f"the cache {chosen[:80]!r} names a user that this machine does not know.") from error


@dataclass(frozen=True)
class Entry:
    """A stored result.

    Attributes:
        folder: its folder.
        what: the result in words.
        made: when it was stored, in ISO 8601.
        used: when it was stored or last used, in seconds since 1970.
        seconds: seconds that computing it took.
        size: bytes of its files.
        value: JSON value of the result.
        files: SHA-256 (hex) of its files by name.
    """

    folder: Path
    what: str
    made: str
    used: float
    seconds: float
    size: int
    value: Any
    files: Mapping[str, str]


@dataclass(frozen=True)
class Cache:
    """A folder of stored results, or none.

    Attributes:
        folder: the folder, or None to store nothing.
        limit: bytes of all entries together.
    """

    folder: Path | None = None
    limit: int = LIMIT

    @classmethod
    def named(cls, name: str | Path | None = None) -> Cache:
        """Return the cache in a folder; see `cache_folder`."""
        folder = cache_folder(name)
        if folder is None:
            return cls()
        if name is not None:
            try:
                (folder / _STAGES).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                warn(f"--cache {str(folder)[:200]}: {error.strerror}. Nothing is stored.")
                return cls()
        return cls(folder / _STAGES)

    def value(self, what: str, kind: type[T], inputs: Sequence[Any], make: Callable[[], T]) -> T:
        """Return the stored result with the same inputs, or call `make` and store its result.

        Args:
            what: the result in words, which are part of the inputs.
            kind: dataclass, or another type that pydantic reads from JSON.
            inputs: JSON values on which the result depends, beside code, libraries and machine.
            make: computes the result.
        """
        found = self.find(what, inputs)
        if found is not None:
            with suppress(ValueError):
                stored = from_json(kind, found.value)
                _say(found)
                return stored
            remove(found.folder)
        begin = time.monotonic()
        made = make()
        self.store(what, inputs, to_json(made), time.monotonic() - begin)
        return made

    def tensors(self, what: str, inputs: Sequence[Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return stored tensors by name, on the CPU, or those that `make` returns; see `value`."""
        found = self.find(what, inputs)
        stored = None if found is None else load_tensors(found)
        if found is not None:
            if stored is not None:
                _say(found)
                return stored
            remove(found.folder)
        begin = time.monotonic()
        made = make()
        if sum(tensor.nbytes for tensor in made.values()) <= self.limit // _PART:
            self.store(what, inputs, None, time.monotonic() - begin, {TENSORS: partial(save_tensors, made)})
        return made

    def of_model(self, arch: str) -> Cache:
        """Return this cache, or one that stores nothing for a model that was given as a Python object.

        The specification of such a model does not identify its code, so that models that compute something else could
        share results.

        Args:
            arch: architecture of the model's specification.
        """
        from ..models.registry import OBJECT

        return Cache() if arch.startswith(f"{OBJECT}/") else self

    def find(self, what: str, inputs: Sequence[Any]) -> Entry | None:
        """Return the entry of a result if it is whole, and note its use; a damaged one is removed and named."""
        if self.folder is None:
            return None
        folder = self.folder / _key(what, inputs)
        if not os.path.lexists(folder):
            return None
        entry = _read(folder)
        if entry is None or not _whole(entry):
            warn(f"{folder} in the cache is damaged. Its result, {what}, is computed again.")
            remove(folder)
            return None
        with suppress(OSError):
            os.utime(folder / _RECORD)
        return entry

    def store(
        self,
        what: str,
        inputs: Sequence[Any],
        value: Any,
        seconds: float,
        files: Mapping[str, Callable[[Path], object]] | None = None,
    ) -> None:
        """Store a result, and remove the entries that exceed the limit; without a writable folder, do nothing.

        Args:
            what, inputs: as in `value`.
            value: JSON value of the result.
            seconds: seconds that computing it took.
            files: functions that write the files of the result, by the files' names.
        """
        if self.folder is None:
            return
        key = _key(what, inputs)
        with suppress(OSError, RobustPruneError):
            self.folder.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=_TEMPORARY, dir=self.folder))
            try:
                for name, write in (files or {}).items():
                    write(part / name)
                record = {
                    "format": _FORMAT, "what": what, "made": datetime.now(UTC).isoformat(timespec="seconds"),
                    "seconds": seconds, "value": value,
                    "files": {name: file_sha256(part / name) for name in files or {}},
                }  # fmt: skip
                write_json(part / _RECORD, {**record, "sha256": digest(record)})
                if _size(part) <= self.limit // _PART and (part / _RECORD).stat().st_size <= LONGEST_JSON:
                    # Another process may have stored the same result meanwhile.
                    with suppress(OSError):
                        part.rename(self.folder / key)
            except Exception as error:
                # safetensors has an error of its own for a full disk.
                if not isinstance(error, OSError | RobustPruneError) and type(error).__name__ != "SafetensorError":
                    raise
            finally:
                remove(part)
            self.shrink(self.limit)

    def forget(self, what: str, inputs: Sequence[Any]) -> None:
        """Remove the entry of a result, if there is one."""
        if self.folder is not None:
            remove(self.folder / _key(what, inputs))

    def entries(self) -> list[Entry]:
        """Return all entries whose records can be read, those used last first; their files are not checked."""
        found = [entry for folder in list(self._folders()) if (entry := _read(folder)) is not None]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def shrink(self, limit: int) -> int:
        """Remove the entries not used for longest until all together have at most `limit` bytes; return how many."""
        sizes = [(_used(folder), _size(folder), folder) for folder in self._folders()]
        total, removed = sum(size for _, size, _ in sizes), 0
        for _, size, folder in sorted(sizes):
            if total <= limit:
                break
            remove(folder)
            total, removed = total - size, removed + 1
        for part in self.folder.glob(f".*{_TEMPORARY}") if self.folder is not None else ():
            if limit == 0 or time.time() - _used(part) > _ABANDONED:
                remove(part)
        return removed

    def _folders(self) -> Iterator[Path]:
        if self.folder is not None:
            with suppress(OSError):
                yield from (path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name))


def copied_from(entry: Entry, files: Sequence[Path]) -> bool:
    """Copy the files of an entry to `files`, which have their names; return whether all are there."""
    if {file.name for file in files} != entry.files.keys():
        return False
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry.folder / file.name, file)
    except OSError:
        return False
    return True


def writers(files: Sequence[Path]) -> dict[str, Callable[[Path], object]]:
    """Return functions that copy `files`, by their names, which must differ."""
    return {file.name: partial(shutil.copyfile, file) for file in files}


@cache
def _surroundings() -> str:
    """Return the hash of this package's code, the versions of libraries, and the machine."""
    root, sha = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root).as_posix()}|".encode())
        sha.update(path.read_bytes())
    return digest([
        _FORMAT, __version__, sha.hexdigest(), host.versions(_LIBRARIES), host.cpu_name(), host.device_name(),
    ])  # fmt: skip


def _key(what: str, inputs: Sequence[Any]) -> str:
    return digest([_surroundings(), what, list(inputs)])


def _read(folder: Path) -> Entry | None:
    """Return an entry, or None if it has no record, a damaged one, or is a link."""
    try:
        if folder.is_symlink():
            return None
        record = read_json(folder / _RECORD)
        seal = record.pop("sha256")
        entry = Entry(
            folder, str(record["what"]), str(record["made"]), _used(folder), float(record["seconds"]), _size(folder),
            record["value"], {str(name): str(sha) for name, sha in record["files"].items()},
        )  # fmt: skip
        return entry if seal == digest(record) else None
    except (
        RobustPruneError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
        OSError,
    ):
        return None


def _whole(entry: Entry) -> bool:
    try:
        return all(
            Path(name).name == name and not (entry.folder / name).is_symlink() and (entry.folder / name).is_file()
            and file_sha256(entry.folder / name) == sha for name, sha in entry.files.items()
        )  # fmt: skip
    except OSError:
        return False


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(entry: Entry) -> dict[str, Tensor] | None:
    """Return the tensors of an entry by name, on the CPU, or None if they cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(entry.folder / TENSORS)
    except Exception:  # another process may have removed the entry, and the library has errors of its own
        return None


def _say(entry: Entry) -> None:
    if entry.seconds >= WORTH_A_LINE:
        console.print(f"{entry.what}: from the cache, stored {moment(entry)}", markup=False)


def moment(entry: Entry) -> str:
    """Return when an entry was stored, for people, in UTC."""
    return printable(entry.made[:16].replace("T", " "))


def _used(folder: Path) -> float:
    try:
        return (folder / _RECORD).stat().st_mtime
    except OSError:
        with suppress(OSError):
            return folder.stat().st_mtime
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for file in folder.iterdir():
            total += file.lstat().st_size
    return total


def remove(folder: Path) -> None:
    """Remove an entry, at once, so that a kill leaves none without a record."""
    with suppress(OSError):
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink()
            return
        aside = folder
        if not folder.name.endswith(_TEMPORARY):
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_TEMPORARY, dir=folder.parent))
            folder.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)
