"""Progress of an evaluation on disk, so that a killed one goes on where it stopped."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..run_dir import atomic_write

Flags = NDArray[np.bool_]
ARRAYS = ("clean", "robust", "twin_clean", "twin_robust")


@dataclass
class Counters:
    """What an evaluation has spent and found so far.

    Attributes:
        clean_done: images whose clean prediction is known (a prefix of the set).
        attacked: images attacked so far (a prefix of those that are right without an attack).
        forwards, backwards: image passes spent by the attack and by the scoring of its results.
        twin_mismatch: clean images on which model and twin predict different classes.
        seconds: wall time, earlier interrupted runs included.
        flags: warnings raised so far.
    """

    clean_done: int = 0
    attacked: int = 0
    forwards: int = 0
    backwards: int = 0
    twin_mismatch: int = 0
    seconds: float = 0.0
    flags: list[str] = field(default_factory=list)


@dataclass
class EvalState:
    """Per-image outcomes (bool [N] each, in the order of the image set) and the counters.

    `robust` and `twin_robust` are False until an image has survived its attacks.
    """

    key: str
    clean: Flags
    robust: Flags
    twin_clean: Flags
    twin_robust: Flags
    counters: Counters

    @classmethod
    def fresh(cls, key: str, total: int) -> EvalState:
        """The state before the first of `total` images."""
        return cls(key=key, counters=Counters(), **{name: np.zeros(total, dtype=np.bool_) for name in ARRAYS})

    def save(self, path: Path) -> None:
        """Writes the state atomically."""
        head = np.frombuffer(json.dumps({"key": self.key, **asdict(self.counters)}).encode(), dtype=np.uint8)

        def write(part: Path) -> None:
            with part.open("wb") as stream:
                np.savez(stream, head=head, **{name: getattr(self, name) for name in ARRAYS})

        atomic_write(path, write)


def load_state(path: Path, key: str, total: int) -> tuple[EvalState, str]:
    """The stored state if it was made under `key`, else a fresh one.

    Returns:
        The state, and a sentence saying why a stored file was not used (empty otherwise).
    """
    if not path.exists():
        return EvalState.fresh(key, total), ""
    try:
        with np.load(path, allow_pickle=False) as stored:
            head = json.loads(stored["head"].tobytes().decode())
            arrays = {name: np.array(stored[name]) for name in ARRAYS}
        found = head.pop("key")
        counters = Counters(**head)
        whole = all(a.shape == (total,) and a.dtype == np.bool_ for a in arrays.values())
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        return EvalState.fresh(key, total), f"{path} is damaged ({type(error).__name__}): the evaluation starts over."
    if found != key:
        return EvalState.fresh(key, total), f"{path} belongs to another model or other settings: starting over."
    if not whole:
        return EvalState.fresh(key, total), f"{path} is damaged (wrong shapes): the evaluation starts over."
    return EvalState(key=key, counters=counters, **arrays), ""
