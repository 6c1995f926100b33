"""Decisions that were made by timing, kept in the user's cache so that the same machine decides the same again.

Two precisions can be equally fast, and so can steps with and without compilation. A choice between them by timing would
differ from run to run, and with it the last bits of every weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

from ..errors import RobustPruneError
from ..machine import host
from ..runs.cache import cache_folder
from ..runs.files import digest, read_json, write_json

LOCK_SECONDS = 10
_FILE = "decisions.json"


def decided(what: str, inputs: Any, decide: Callable[[], dict[str, bool]]) -> dict[str, bool]:
    """Return the stored decision for the same inputs on this machine, or call `decide` and store what it returns.

    Args:
        what: name of the decision.
        inputs: JSON values on which it depends, beside processor, device and versions.
        decide: makes the decision.
    """
    key = digest([what, inputs, host.cpu_name(), host.device_name(), host.versions(("torch", "robust-prune"))])
    folder = cache_folder()
    if folder is None:
        return decide()
    file = folder / _FILE
    known = _stored(file).get(key)
    if isinstance(known, dict) and known and all(isinstance(value, bool) for value in known.values()):
        return known
    made = decide()
    # Without a writable cache the decision holds for this run only.
    with suppress(RobustPruneError, OSError, NotImplementedError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=LOCK_SECONDS):  # a run beside this one may be deciding too
            write_json(file, _stored(file) | {key: made})
    return made


def structure(model: nn.Module) -> list[Any]:
    """Return the class of a model and the names and shapes of its parameters, as JSON values."""
    return [str(type(model)), [(name, list(value.shape)) for name, value in model.named_parameters()]]


def _stored(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except RobustPruneError:
        return {}
    return value if isinstance(value, dict) else {}
