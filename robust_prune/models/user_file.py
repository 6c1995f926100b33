"""Functions in users' files, ``path/to/file.py:function``, such as models and losses."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import RobustPruneError, UsageError
from ..runs.files import file_sha256
from ..suggest import did_you_mean
from .spec import ModelSpec


def is_reference(arch: str) -> bool:
    """Return whether `arch` has the form ``file.py:function`` or ``file.py``."""
    return arch.endswith(".py") or ".py:" in arch


def locate(arch: str) -> tuple[Path, str]:
    """Return the file and the name of the function; relative paths start at the working directory.

    Raises:
        UsageError: no function is named, or the file does not exist.
    """
    text, _, name = arch.rpartition(":") if ".py:" in arch else (arch, "", "")
    path = Path(text).expanduser()
    if not path.is_file():
        raise UsageError(f"the file {text} of {arch!r} does not exist (looked in {Path.cwd()})")
    if not name:
        raise UsageError(f"{arch!r} names no function. Write {text}:<function>, e.g. {text}:make_model.")
    return path, name


def sha256(arch: str) -> str:
    """Return the SHA-256 of the referenced file; files that it imports are not included.

    Raises:
        UsageError: as `locate`.
    """
    return file_sha256(locate(arch)[0])


def versions(*names: str) -> list[str]:
    """Return the SHA-256 of each user's file among `names`, on whose contents results depend.

    Raises:
        UsageError: as `locate`.
    """
    return [sha256(name) for name in names if is_reference(name)]


def load_function(reference: str) -> Callable[..., Any]:
    """Return the function of ``file.py:function``; this runs the file.

    Raises:
        UsageError: the file does not exist, cannot be run, or lacks the function.
    """
    path, name = locate(reference)
    return _function(path, name, file_sha256(path))


def call(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    """Run the user's function and return its module.

    ``num_classes`` and ``in_chans`` are passed if the function accepts them. The file can import modules of its own
    folder.

    Args:
        spec: specification whose `arch` is the reference.
        kwargs: further keyword arguments.

    Raises:
        UsageError: the file has changed since `spec` was made, cannot be run or lacks the function, or the function
            does not accept an argument, fails or returns no module. The message names file and line.
    """
    path, name = locate(spec.arch)
    found = file_sha256(path)
    if spec.source_sha256 and found != spec.source_sha256:
        raise UsageError(
            f"{path} has changed: the model was made with sha256 {spec.source_sha256[:12]}…, the file now has "
            f"{found[:12]}…. Restore that version, or give the weights as a plain state_dict with --arch."
        )
    function = _function(path, name, found)
    accepted = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    offered = {"num_classes": spec.num_classes, "in_chans": spec.input_size[0]}
    arguments = {key: value for key, value in offered.items() if key in accepted} | kwargs
    for key in kwargs:
        if key not in accepted and not anything:
            raise UsageError(f"{spec.arch} takes no argument {key!r}; it takes {', '.join(accepted) or 'none'}")
    with _importable(path.resolve().parent):
        try:
            model = function(**arguments)
        except Exception as error:  # any error of the user's code is reported as theirs
            raise UsageError(f"{spec.arch} failed: {blame(error, spec.arch)}{_message(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec.arch} must return a torch.nn.Module, got {type(model).__name__}")
    return model


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Turn errors of a user's function, ``file.py:function``, into one line with file and line; others pass through.

    Raises:
        UsageError: the function failed.
    """
    try:
        yield
    except RobustPruneError:
        raise
    except Exception as error:  # any error of the user's code is reported as theirs
        if not is_reference(name):
            raise
        raise UsageError(f"{name} failed: {blame(error, name)}{type(error).__name__}: {error}") from error


def blame(error: BaseException, arch: str) -> str:
    """Return ``"file.py:12: "`` for the innermost line of the user's file in the traceback, else an empty string."""
    if not is_reference(arch):
        return ""
    path = locate(arch)[0]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
    return f"{path}:{lines[-1]}: " if lines else ""


def _function(path: Path, name: str, digest: str) -> Callable[..., Any]:
    module_name = f"robust_prune_user_{digest[:16]}"
    specification = importlib.util.spec_from_file_location(module_name, path)
    if specification is None or specification.loader is None:
        raise UsageError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses and pickle look up their module by name while it runs.
    sys.modules[module_name] = module
    with _importable(path.resolve().parent):
        try:
            specification.loader.exec_module(module)
        except Exception as error:  # see `call`
            del sys.modules[module_name]
            raise UsageError(f"{path} cannot be run: {blame(error, f'{path}:{name}')}{_message(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{path} has no function {name!r}.{did_you_mean(name, known)}")
    return function


def _message(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())[:300]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
