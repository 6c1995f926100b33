"""A run folder: claimed by one command, and filled stage by stage; run again, a finished stage is taken from it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .. import __version__, distributed
from ..errors import UsageError
from ..machine.snapshot import snapshot
from ..recipe import Recipe
from ..serialization import from_json, to_json
from .files import digest, read_json, write_json, write_text

T = TypeVar("T")

FORMAT = 2
"""Of a run folder; one of another format is refused."""

_WRITTEN = (
    "environment.json", "model.onnx", "model.safetensors", "recipe.yaml", "report.html", "result.csv", "result.json",
    "result.md",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A claimed run folder.

    Attributes:
        folder: where everything of the run lies, a sub-folder a stage.
        key: hash of everything that the run depends on.
        seconds: wall time of each stage so far, by name; of the run that did the work.
    """

    folder: Path
    key: str
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, key: str, recipe: Recipe, command: str) -> Run:
        """Claims `folder` for the run with hash `key`, and notes recipe, command and environment in it.

        Raises:
            UsageError: the folder holds another run, a run of an older version or files of another origin that would be
                overwritten, or is a file.
            EnvironmentProblem: it cannot be written.
        """
        claim(folder, key, command)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        write_json(folder / "environment.json", snapshot())
        return cls(folder, key)

    def stage(
        self,
        name: str,
        kind: type[T],
        inputs: Sequence[Any],
        make: Callable[[], T],
        *,
        files: Sequence[Path] = (),
        shared: bool = False,
    ) -> T:
        """The outcome of a stage: what `make` returns, or what it returned when the same inputs went through it before.

        Of several processes (see `distributed`) the first one makes it while the others wait, or, `shared`, all of them
        work on it; the first one's outcome counts. The folder must be one that all of them see.

        Args:
            name: of the stage and its sub-folder.
            kind: what `make` returns: a dataclass.
            inputs: JSON values that the outcome depends on beside the run's key.
            make: does the work, and writes `files`.
            files: must exist for a stored outcome to count.
            shared: whether all processes call `make`.
        """
        first, mark = distributed.is_first(), self.folder / name / "stage.json"
        key = digest([self.key, name, *inputs])
        stored = _stored(mark, key, kind) if first and all(file.exists() for file in files) else None
        stored = distributed.broadcast(stored)
        if stored is None:
            begin = time.monotonic()
            value = make() if first or shared else None
            if first:
                stored = {"key": key, "seconds": time.monotonic() - begin, "value": to_json(value)}
                write_json(mark, stored)
            stored = distributed.broadcast(stored)
        assert stored is not None
        self.seconds[name] = stored["seconds"]
        # A fresh outcome comes back from its JSON too, so that a resumed run works with the very same values.
        return from_json(kind, stored["value"])


def _stored(mark: Path, key: str, kind: type[Any]) -> dict[str, Any] | None:
    try:
        stored = json.loads(mark.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or stored.get("key") != key:
            return None
        from_json(kind, stored["value"])
        return stored if isinstance(stored["seconds"], int | float) else None
    except (OSError, ValueError, KeyError):
        return None


def run_key(*inputs: Any) -> str:
    """The hash of everything that a run depends on: `inputs` (JSON values), and this package's version."""
    return digest([FORMAT, __version__, *inputs])


def claim(folder: Path, key: str, command: str) -> None:
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
    stored = read_json(mark) if mark.exists() else {"format": FORMAT, "key": key}
    if isinstance(stored, dict) and "key" in stored and stored.get("format") != FORMAT:
        raise UsageError(
            f"{folder} holds a run of another version of robust-prune, which this one cannot go on with. "
            "Name another folder with --out, or remove it."
        )
    if not isinstance(stored, dict) or stored.get("key") != key:
        raise UsageError(
            f"{folder} holds a run with another model, data, recipe or version. "
            "Name another folder with --out, or remove it."
        )
    write_json(mark, {"format": FORMAT, "key": key, "command": command})
