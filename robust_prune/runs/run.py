"""Run folders: each belongs to one command and stores the results of its stages, from which a run is resumed."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from .. import __version__, distributed
from ..console import console, duration, say_end, warn, working
from ..errors import EnvironmentProblem, RobustPruneError, UsageError
from ..machine.snapshot import snapshot
from ..printable import printable
from ..recipe import Recipe
from ..serialization import from_json, to_json
from .cache import Cache, copied_from, writers
from .files import digest, file_sha256, json_text, read_json, remove_parts, write_json, write_text

T = TypeVar("T")

FORMAT = 4
"""Format of run folders; folders of another format cannot be resumed."""

LOCK = ".lock"
RECORD = "stage.json"
_CLAIM = (LOCK, "environment.json", "recipe.yaml", "run.json")
_WRITTEN = (
    "dense.onnx", "dense.safetensors", "environment.json", "model.fp16.onnx", "model.int8.onnx", "model.onnx",
    "model.safetensors", "recipe.yaml", "report.html", "result.csv", "result.json", "result.md", "scratch.onnx",
    "scratch.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run and its folder.

    Attributes:
        folder: folder of the run, with a sub-folder for each stage.
        key: hash of everything on which the run depends.
        command: command line that reproduces the run.
        stages: what each stage does, in words, by its name and in order; other stages are not announced.
        seconds: wall time in seconds of each stage so far, by name; for a stored result that of its computation.
        made: names of the stages whose results were not stored.
        damaged: names of the stages whose records or files were found damaged.
        begin: when the run was opened, by the monotonic clock.
        fresh: whether this process claimed the folder first.
        check: raises if something on which results depend has changed since the run began; called after each stage.
        lock: what keeps other processes out of the folder until the ``with`` block of the run ends.
        cache: results that runs of the same model and data share.
    """

    folder: Path
    key: str
    command: str = ""
    stages: Mapping[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)
    fresh: bool = False
    check: Callable[[], None] = lambda: None
    lock: FileLock | None = None
    cache: Cache = field(default_factory=Cache)

    @classmethod
    def open(
        cls, folder: Path, inputs: RunInputs, recipe: Recipe, command: str, stages: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None, cache: Cache | None = None,
    ) -> Run:  # fmt: skip
        """Claim `folder` for the run with these inputs, and write recipe, command and environment to it.

        Args:
            folder: folder of the run.
            inputs: hashes of everything on which the run depends.
            recipe: all settings.
            command: command line that reproduces the run.
            stages, check, cache: as in the class.

        Raises:
            UsageError: the folder contains another run, a run of another format or other files that would be
                overwritten, it is a file, or another process works in it.
            EnvironmentProblem: the folder cannot be written.
        """
        refuse_links(folder)
        lock = locked(folder)
        # After locking, since another process may have claimed the folder meanwhile.
        fresh = not (folder / "run.json").exists()
        try:
            texts = {"recipe.yaml": recipe.to_yaml(), "environment.json": json_text(snapshot())}
            claim(folder, inputs, command, list(stages or {}), texts)
            if lock is not None:
                remove_parts(folder)
            for name, text in texts.items():
                write_text(folder / name, text)
        except RobustPruneError:
            if lock is not None:
                lock.release()
                if fresh and not (folder / "run.json").exists():
                    (folder / LOCK).unlink(missing_ok=True)
            raise
        return cls(
            folder, inputs.key, command, stages or {}, fresh=fresh, check=check, lock=lock, cache=cache or Cache()
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            self.lock.release()

    @contextmanager
    def refusable(self, *files: Path) -> Iterator[None]:
        """Leave no trace of the run if what it was given is refused inside the ``with`` block.

        The folder would otherwise refuse the same command once the model or the data are mended.

        Args:
            files: files that the stages inside the block write to the folder, beside their own folders.
        """
        before = set(self.seconds)
        try:
            yield
        except RobustPruneError:
            if self.fresh and distributed.is_first():
                stages = [self.folder / name for name in set(self.seconds) - before]
                for path in (*stages, *files, *(self.folder / name for name in _CLAIM)):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                with suppress(OSError):
                    self.folder.rmdir()
            raise

    def stage(
        self,
        name: str,
        kind: type[T],
        inputs: Sequence[Any],
        make: Callable[[], T],
        *,
        files: Sequence[Path] = (),
        shared: bool = False,
        reuse: Sequence[Any] | None = None,
    ) -> T:
        """Return the stored result of a stage with the same inputs, or call `make` and store its result.

        In a distributed run the first process calls `make` while the others wait; with `shared` all processes call it,
        and the result of the first one is used. All processes must have access to the folder.

        Args:
            name: name of the stage and of its sub-folder.
            kind: dataclass that `make` returns.
            inputs: JSON values on which the result depends, in addition to the run's key.
            make: computes the result and writes `files`.
            files: files that the stage writes; their hashes are stored. A result is computed again if one of them is
                missing or was changed, or if that happened to an earlier stage.
            shared: whether all processes call `make`.
            reuse: JSON values of all that the result depends on, if that is less than the inputs of the run: it is then
                taken from the cache, or stored there for other runs. `files` must have different names.
        """
        first, mark = distributed.is_first(), self.folder / name / RECORD
        given = digest(list(inputs))
        key = stage_key(self.key, name, given)
        stored, problem = self._stored(mark, key, kind, files) if first else (None, "")
        if problem:
            warn(f"{problem}. This stage and those after it are done again.")
            self.damaged.append(name)
        whence = " (from an earlier run)"
        if first and stored is None and reuse is not None:
            stored, whence = self._reused(name, key, given, reuse, kind, files), " (from the cache)"
        stored = distributed.broadcast(stored)
        if stored is None:
            self._announce(name)
            begin = time.monotonic()
            with working(self._title(name)):
                value = make() if first or shared else None
            seconds = time.monotonic() - begin
            self.check()
            if first:
                stored = self._record(name, key, given, seconds, to_json(value), files)
                if reuse is not None:
                    self.cache.store(self._title(name), reuse, to_json(value), seconds, writers(files))
            stored = distributed.broadcast(stored)
            self.made.append(name)
            if name in self.stages:
                say_end(self._place(name), seconds)
        else:
            self._announce(name, whence)
        assert stored is not None
        self.seconds[name] = stored["seconds"]
        # A fresh result is read back from JSON too, so that a resumed run has exactly the same values.
        return from_json(kind, stored["value"])

    def _stored(
        self, mark: Path, key: str, kind: type[Any], files: Sequence[Path]
    ) -> tuple[dict[str, Any] | None, str]:
        """Return the record of a stage, if it is of this key and whole, and what is wrong with it otherwise."""
        if not mark.exists():
            return None, ""
        try:
            stored = read_json(mark)
        except UsageError:
            return None, f"{mark} is damaged"
        if self.damaged or (isinstance(stored, dict) and stored.get("key") != key):
            return None, ""
        try:
            whole = is_sealed(stored) and math.isfinite(stored["seconds"]) and isinstance(stored["files"], dict)
            from_json(kind, stored["value"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            whole = False
        if not whole:
            return None, f"{mark} is damaged or was changed"
        for file in files:
            if not file.is_file():
                return None, f"{file} is missing"
            if stored["files"].get(self._relative(file)) != file_sha256(file):
                file.unlink()  # a stage may go on from a file of its own, such as the progress of an attack
                return None, f"{file} is damaged or was changed"
        return stored, ""

    def _reused(
        self, name: str, key: str, given: str, reuse: Sequence[Any], kind: type[Any], files: Sequence[Path]
    ) -> dict[str, Any] | None:
        """Return the record of a stage whose result is in the cache, with its files put in their places."""
        entry = self.cache.find(self._title(name), reuse)
        if entry is None:
            return None
        try:
            from_json(kind, entry.value)
        except ValueError:
            self.cache.forget(self._title(name), reuse)
            return None
        if not copied_from(entry, files):
            return None
        return self._record(name, key, given, entry.seconds, entry.value, files)

    def _record(
        self, name: str, key: str, given: str, seconds: float, value: Any, files: Sequence[Path]
    ) -> dict[str, Any]:
        """Write and return the record of a stage."""
        hashes = {self._relative(file): file_sha256(file) for file in files if file.is_file()}
        stored = sealed({"key": key, "inputs": given, "seconds": seconds, "value": value, "files": hashes})
        write_json(self.folder / name / RECORD, stored)
        return stored

    def _title(self, name: str) -> str:
        return self.stages.get(name, name)

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def _announce(self, name: str, whence: str = "") -> None:
        if name in self.stages:
            console.print(f"{self._place(name)} {self.stages[name]}{whence}", markup=False)

    def _place(self, name: str) -> str:
        return f"[{list(self.stages).index(name) + 1}/{len(self.stages)}]"

    def total(self) -> str:
        """Return the wall time of the run so far, in words, with that of earlier runs from which it took results."""
        now = time.monotonic() - self.begin
        earlier = sum(seconds for name, seconds in self.seconds.items() if name not in self.made)
        return duration(now) + (f", {duration(now + earlier)} with the stages of earlier runs" if earlier else "")


def stage_key(run: str, name: str, inputs: str) -> str:
    """Return the key of a stage from that of its run, its name and the hash of its inputs."""
    return digest([run, name, inputs])


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Return whether the record of a stage carries the hash of its values."""
    return record == sealed(record)


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a stage with the hash of its other values."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return {**rest, "sha256": digest(rest)}


@dataclass(frozen=True)
class RunInputs:
    """Hashes of everything on which a run depends.

    Attributes:
        model: the model, or the specification of the one to train.
        data: all images and labels.
        recipe: all settings.
        code: users' files that the run calls.
        version: version of this package.
    """

    model: str
    data: str
    recipe: str
    code: str
    version: str = __version__

    @classmethod
    def of(cls, model: Any, data: Any, recipe: Any, code: Any) -> RunInputs:
        """Return the hashes of JSON values."""
        return cls(digest(model), digest(data), digest(recipe), digest(code))

    @property
    def key(self) -> str:
        """Hash of all of them."""
        return digest([FORMAT, to_json(self)])


def locked(folder: Path) -> FileLock | None:
    """Lock a folder, which is made if necessary, until the lock is released or the process ends, however it does.

    In a distributed run the first process holds the lock. None stands for a file system without locks.

    Raises:
        UsageError: another process holds it; the message says which.
        EnvironmentProblem: the folder cannot be written.
    """
    if not distributed.is_first():
        return None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file. Name a folder.")
    lock = FileLock(folder / LOCK, is_singleton=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"another process works in {folder}{_holder(folder)}. Wait until it has ended, or name another folder "
            "with --out."
        ) from error
    except NotImplementedError:
        return None
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {folder}: {error.strerror}. Choose another --out.") from error
    return lock


def refuse_links(folder: Path) -> None:
    """Refuse a run folder that holds links, through which a run would write to files elsewhere.

    Raises:
        UsageError: the folder or one of its own folders holds a link.
    """
    if not folder.is_dir():
        return
    # Unlike iterdir, glob passes over folders that cannot be read.
    inner = [path for path in folder.glob("*") if path.is_dir() and not (path / "run.json").exists()]
    for place in (folder, *inner):
        for path in place.glob("*"):
            if path.is_symlink():
                raise UsageError(
                    f"{path} is a link, and a run writes to no files elsewhere. Remove it, or name another folder with "
                    "--out."
                )


def _holder(folder: Path) -> str:
    try:
        holder = read_json(folder / "run.json")["holder"]
        return f" (process {int(holder['process'])} on {printable(str(holder['machine']))[:80]})"
    except (RobustPruneError, LookupError, TypeError, ValueError):
        return ""


def claim(
    folder: Path, inputs: RunInputs, command: str, stages: Sequence[str] = (), texts: Mapping[str, str] | None = None
) -> None:
    """Claim `folder` for the run with these inputs; a further call with the same ones resumes the run.

    Args:
        folder: folder of the run.
        inputs: hashes of everything on which the run depends.
        command: command line that reproduces the run.
        stages: names of its stages.
        texts: contents of the files that are written to the folder before the stages, by name.

    Raises:
        UsageError: the folder contains a run with other inputs, a run of another format or other files that would be
            overwritten, or it is a file.
        EnvironmentProblem: the folder cannot be written.
    """
    mark = folder / "run.json"
    if not mark.exists() and (others := sorted(name for name in _WRITTEN if (folder / name).exists())):
        raise UsageError(
            f"{folder} is not a run folder and holds {', '.join(others)}, which a run would overwrite. "
            "Name another folder with --out."
        )
    stored = read_json(mark) if mark.exists() else {"format": FORMAT, "inputs": to_json(inputs)}
    if isinstance(stored, dict) and ("key" in stored or "inputs" in stored) and stored.get("format") != FORMAT:
        raise UsageError(
            f"{folder} holds a run of another version of robust-prune, which this one cannot go on with. "
            "Name another folder with --out, or remove it."
        )
    try:
        before = from_json(RunInputs, stored["inputs"])
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{mark} is damaged. Name another folder with --out, or remove {folder}.") from error
    changed = [field.name for field in fields(inputs) if getattr(before, field.name) != getattr(inputs, field.name)]
    if changed:
        raise UsageError(
            f"{folder} holds a run with another {' and another '.join(changed)}. Name another folder with --out, or "
            "remove it."
        )
    holder = {"process": os.getpid(), "machine": platform.node(), "since": datetime.now(UTC).isoformat("T", "seconds")}
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (texts or {}).items()}
    write_json(mark, {
        "format": FORMAT, "inputs": to_json(inputs), "command": command, "stages": list(stages), "files": files,
        "holder": holder,
    })  # fmt: skip
