"""Progress of an evaluation on disk, so that a killed one goes on where it stopped."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runs.files import atomic_write

Flags = NDArray[np.bool_]
ARRAYS = ("clean", "robust")
EXPORTED_ARRAYS = ("exported_clean", "exported_robust")


@dataclass
class Counters:
    """What an evaluation has spent and found so far.

    Attributes:
        classes: number of logits; 0 until the model has answered.
        clean_done: images whose clean prediction is known (a prefix of the set).
        stage: attacks of the tier that are over.
        attacked: images that the present one has attacked (a prefix of those that stood when it began).
        forwards, backwards: image passes spent by the attack and by the scoring of its results.
        exported_mismatch: by exported file, clean images on which it and the model predict different classes.
        seconds: wall time, earlier interrupted runs included.
        flags: warnings raised so far.
        black_box: survivors that the black-box check tried and broke; None until it has run.
        exported_black_box: the same for each exported file that it has run on.
        sweep: images that survive, and images tried, by the radius as a string.
    """

    classes: int = 0
    clean_done: int = 0
    stage: int = 0
    attacked: int = 0
    forwards: int = 0
    backwards: int = 0
    exported_mismatch: list[int] = field(default_factory=list)
    seconds: float = 0.0
    flags: list[str] = field(default_factory=list)
    black_box: list[int] | None = None
    exported_black_box: list[list[int]] = field(default_factory=list)
    sweep: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class EvalState:
    """Per-image outcomes ([N], for exported files [T, N], in the order of the image set) and the counters.

    Attributes:
        key: hash of what they depend on.
        clean, exported_clean: right without an attack (bool).
        robust, exported_robust: right so far (bool).
        fell: which attack broke an image (int8): its position in the tier, -1 for none.
        counters: the rest.
    """

    key: str
    clean: Flags
    robust: Flags
    exported_clean: Flags
    exported_robust: Flags
    fell: NDArray[np.int8]
    counters: Counters

    @classmethod
    def fresh(cls, key: str, total: int, exported: int = 0) -> EvalState:
        """The state before the first of `total` images."""
        flags = {name: np.zeros(total, dtype=np.bool_) for name in ARRAYS}
        flags |= {name: np.zeros((exported, total), dtype=np.bool_) for name in EXPORTED_ARRAYS}
        counters = Counters(exported_mismatch=[0] * exported)
        return cls(key=key, counters=counters, fell=np.full(total, -1, dtype=np.int8), **flags)

    def save(self, path: Path) -> None:
        """Writes the state atomically."""
        head = np.frombuffer(json.dumps({"key": self.key, **asdict(self.counters)}).encode(), dtype=np.uint8)

        def write(part: Path) -> None:
            with part.open("wb") as stream:
                np.savez(
                    stream,
                    head=head,
                    fell=self.fell,
                    **{name: getattr(self, name) for name in (*ARRAYS, *EXPORTED_ARRAYS)},
                )

        atomic_write(path, write)


def load_state(path: Path, key: str, total: int, exported: int = 0) -> tuple[EvalState, str]:
    """The stored state if it was made under `key`, else a fresh one.

    Returns:
        The state, and a sentence saying why a stored file was not used (empty otherwise).
    """
    if not path.exists():
        return EvalState.fresh(key, total, exported), ""
    try:
        with np.load(path, allow_pickle=False) as stored:
            head = json.loads(stored["head"].tobytes().decode())
            arrays = {name: np.array(stored[name]) for name in (*ARRAYS, *EXPORTED_ARRAYS)}
            fell = np.array(stored["fell"])
        found = head.pop("key")
        counters = Counters(**head)
        shapes = {**dict.fromkeys(ARRAYS, (total,)), **dict.fromkeys(EXPORTED_ARRAYS, (exported, total))}
        whole = all(a.shape == shapes[name] and a.dtype == np.bool_ for name, a in arrays.items())
        whole = whole and fell.shape == (total,) and fell.dtype == np.int8
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        return EvalState.fresh(
            key, total, exported
        ), f"{path} is damaged ({type(error).__name__}): the evaluation starts over."
    if found != key:
        return EvalState.fresh(
            key, total, exported
        ), f"{path} belongs to another model or other settings: starting over."
    if not whole:
        return EvalState.fresh(key, total, exported), f"{path} is damaged (wrong shapes): the evaluation starts over."
    return EvalState(key=key, counters=counters, fell=fell, **arrays), ""
