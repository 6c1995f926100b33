"""Parts of a long computation, stored in the cache as they are done, from which a killed process goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .cache import TENSORS, Cache, load_tensors, remove, save_tensors
from .files import digest

if TYPE_CHECKING:
    from torch import Tensor

WORK_FOR_WRITING = 5.0
"""Seconds of work between two parts of a computation for each second that storing a part takes."""


@dataclass(frozen=True)
class Parts:
    """Tensors that a long computation has found so far, by the name of the part.

    Attributes:
        cache: where they are stored.
        what: the computation in words, with the hash of its inputs.
        pace: when a part was stored last, and how long that took, in seconds.
    """

    cache: Cache = field(default_factory=Cache)
    what: str = ""
    pace: dict[str, float] = field(default_factory=dict)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors of a part, on the CPU, or None if it is not stored."""
        entry = self.cache.find(self.what, [name])
        found = None if entry is None else load_tensors(entry)
        if entry is not None and found is None:
            remove(entry.folder)
        return found

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a part, unless storing would take a large share of the time since the last one."""
        self._put(name, tensors)

    def _put(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        begin = time.monotonic()
        if begin - self.pace.get("stored", -math.inf) < WORK_FOR_WRITING * self.pace.get("took", 0.0):
            return False
        self.cache.store(self.what, [name], None, 0.0, {TENSORS: partial(save_tensors, tensors)})
        self.pace["stored"] = time.monotonic()
        self.pace["took"] = self.pace["stored"] - begin
        return True

    def last(self, name: str, steps: int) -> tuple[int, dict[str, Tensor]]:
        """Return the last of at most `steps` steps after which `step` stored tensors, and these; 0 and none without."""
        for number in range(steps, 0, -1):
            found = self.get(f"{name} {number}")
            if found is not None:
                self.pace[name] = number
                return number, found
        return 0, {}

    def step(self, name: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors that step `number`, counted from 1, leaves, in place of earlier ones; see `put`."""
        if self._put(f"{name} {number}", tensors):
            earlier = int(self.pace.get(name, 0))
            self.cache.forget(self.what, [f"{name} {earlier}"])
            self.pace[name] = number


@contextmanager
def parts(cache: Cache, what: str, inputs: Sequence[Any]) -> Iterator[Parts]:
    """Yield the parts of a computation that a killed process left; they are removed when the block succeeds.

    Args:
        cache: where they are stored.
        what, inputs: those under which the result of the computation will be stored.
    """
    whole = f"{what}, in part ({digest(list(inputs))})"
    yield Parts(cache, whole)
    for entry in cache.entries():
        if entry.what == whole:
            remove(entry.folder)
