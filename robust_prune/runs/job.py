"""What a compression is asked to do, and the log of stages that are done: run again, a stage is taken from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import distributed
from ..console import console
from ..data.base import DataBundle
from ..models.artifact import Loaded
from ..recipe import Recipe
from .files import RunDir, digest, finite


@dataclass(frozen=True)
class Job:
    """One compression: what to compress, on which data, how, and where to.

    Attributes:
        name: how the model is called in tables and folder names.
        loaded: the dense model.
        data: its data set.
        recipe: everything else.
        out: the run folder; None derives one from name, ratio and inputs.
        command: the command line that repeats the run.
        arch: where the user's ``file.py:function`` lies, if that is the architecture.
    """

    name: str
    loaded: Loaded
    data: DataBundle
    recipe: Recipe
    out: Path | None = None
    command: str = ""
    arch: str | None = None


class StageLog:
    """Runs a stage, or takes its stored outcome when the same inputs have been through it before."""

    def __init__(self, run: RunDir, key: str) -> None:
        """`key` is the hash of the whole run's inputs; every stage's own inputs are added to it."""
        self.run, self.key, self.seconds = run, key, dict[str, float]()

    def once(
        self, name: str, inputs: Any, make: Callable[[], Any], files: tuple[Path, ...] = (), *, together: bool = False
    ) -> Any:
        """The JSON outcome of stage `name`; `files` must exist for a stored one to count.

        Of several processes the first one makes it while the others wait, or all do, `together`; its outcome counts.
        The folder must be one that all of them see.
        """
        first = distributed.is_first()
        key = digest([self.key, name, inputs])
        stored = self.run.finished(name, key) if first else None
        if stored is not None and not all(file.exists() for file in files):
            stored = None
        stored = distributed.from_first(stored)
        if stored is None:
            begin = time.monotonic()
            value = make() if first or together else None
            stored = {"value": finite(value), "seconds": time.monotonic() - begin}
            self.run.finish(name, key, stored)
            stored = distributed.from_first(stored)
        self.seconds[name] = stored["seconds"]
        return stored["value"]


def warn(text: str) -> None:
    """Prints a warning, if there is one."""
    if text:
        console.print(f"Note: {text}", markup=False)
