"""Progress of an evaluation, stored on disk so that an interrupted run can be resumed."""

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
    """Counters of an evaluation.

    Attributes:
        classes: number of logits; 0 until the first forward pass.
        clean_done: number of images with a clean prediction (a prefix of the set).
        stage: number of completed attacks of the tier.
        attacked: number of images attacked by the current stage (a prefix of the survivors when it began).
        forwards, backwards: forward and backward passes of single images, for attacks and scoring.
        exported_mismatch: for each exported file, number of clean images on which it and the model differ.
        exported_differs: for each exported file, whether its logits differ from the model's by more than rounding.
        seconds: wall time, including interrupted runs.
        flags: warnings so far.
        black_box: number of survivors that the black-box check attacked and broke; None until it has run.
        exported_black_box: the same for each exported file for which the check has run, by name.
        sweep: number of survivors and number of images, by radius as a string.
        scale: factor of the logits that attacks see.
        checked_again: whether the checks after the attacks are done.
    """

    classes: int = 0
    clean_done: int = 0
    stage: int = 0
    attacked: int = 0
    forwards: int = 0
    backwards: int = 0
    exported_mismatch: list[int] = field(default_factory=list)
    exported_differs: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    flags: list[str] = field(default_factory=list)
    black_box: list[int] | None = None
    exported_black_box: dict[str, list[int]] = field(default_factory=dict)
    sweep: dict[str, list[int]] = field(default_factory=dict)
    scale: float = 1.0
    checked_again: bool = False


@dataclass
class EvalState:
    """Results of every image in the order of the set ([N]; for T exported files [T, N]), and counters.

    Attributes:
        key: hash of everything on which the results depend.
        clean, exported_clean: whether an image is classified correctly without an attack (bool).
        robust, exported_robust: whether it is classified correctly under all attacks so far (bool).
        fell: position in the tier of the attack that broke an image (int8); -1 if none did.
        counters: the counters.
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
        """Return the initial state for `total` images and `exported` files."""
        flags = {name: np.zeros(total, dtype=np.bool_) for name in ARRAYS}
        flags |= {name: np.zeros((exported, total), dtype=np.bool_) for name in EXPORTED_ARRAYS}
        counters = Counters(exported_mismatch=[0] * exported)
        return cls(key=key, counters=counters, fell=np.full(total, -1, dtype=np.int8), **flags)

    def save(self, path: Path) -> None:
        """Write the state to `path` atomically."""
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
    """Return the stored state if it has the same `key`, else a fresh one.

    Args:
        path: the file.
        key: hash of everything on which the results depend.
        total: number of images.
        exported: number of exported files.

    Returns:
        The state, and a sentence that says why a stored file was not used (empty otherwise).
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
