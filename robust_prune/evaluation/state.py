"""Progress of an evaluation, stored on disk so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
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
        head = json.dumps({"key": self.key, **asdict(self.counters)})
        arrays = {name: getattr(self, name) for name in (*ARRAYS, *EXPORTED_ARRAYS, "fell")}
        texts = {"head": head, "sha256": _sha256(head, arrays)}

        def write(part: Path) -> None:
            with part.open("wb") as stream:
                bits = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
                np.savez(stream, **{**bits, **arrays})

        atomic_write(path, write)


def _sha256(head: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    sha = hashlib.sha256(head.encode())
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape};".encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the counters and the arrays of a stored state.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            head, sha256 = (stored[name].tobytes().decode() for name in ("head", "sha256"))
            arrays = {name: np.array(stored[name]) for name in (*ARRAYS, *EXPORTED_ARRAYS, "fell")}
        whole = sha256 == _sha256(head, arrays)
        counters: dict[str, Any] = json.loads(head)
    except Exception as error:  # numpy and zipfile raise errors of many kinds for a damaged file
        raise UsageError(f"{path} is damaged ({type(error).__name__})") from error
    if not whole:
        raise UsageError(f"{path} is damaged (SHA-256)")
    return counters, arrays


def stored_key(path: Path) -> str:
    """Return the key of a stored state in hexadecimal digits; empty for a damaged file."""
    try:
        key = read_state(path)[0].get("key")
    except (UsageError, AttributeError):
        return ""
    return key if isinstance(key, str) and key.isalnum() else ""


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
        head, arrays = read_state(path)
        found = head.pop("key")
        counters = Counters(**head)
    except UsageError as error:
        return EvalState.fresh(key, total, exported), f"{error}: the evaluation starts over."
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"{path} is damaged ({type(error).__name__}): the evaluation starts over."
        return EvalState.fresh(key, total, exported), problem
    if found != key:
        problem = f"{path} belongs to another model or other settings: starting over."
        return EvalState.fresh(key, total, exported), problem
    shapes = {**dict.fromkeys((*ARRAYS, "fell"), (total,)), **dict.fromkeys(EXPORTED_ARRAYS, (exported, total))}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        return EvalState.fresh(key, total, exported), f"{path} is damaged (wrong shapes): the evaluation starts over."
    return EvalState(key=key, counters=counters, **arrays), ""
