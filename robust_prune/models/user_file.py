"""Functions in users' files, ``path/to/file.py:function``, such as models and losses."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..catalogue import is_reference
from ..errors import RobustPruneError, UsageError
from ..suggest import did_you_mean
from . import user_code
from .spec import ModelSpec


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
    """Return the SHA-256 of the referenced file and of what it imports from its folder; see `user_code.read`.

    Raises:
        UsageError: as `locate`, and as `user_code.read`.
    """
    return user_code.read(locate(arch)[0]).sha256


def versions(*names: str) -> list[str]:
    """Return the SHA-256 of each user's file among `names`, with what it imports, on whose contents results depend.

    Raises:
        UsageError: as `sha256`.
    """
    return [sha256(name) for name in names if is_reference(name)]


def check_unchanged(names: Sequence[str], before: Sequence[str]) -> None:
    """Raise UsageError if users' files among `names` have other versions than `before`, what `versions` returned."""
    if versions(*names) != list(before):
        changed = [name for name in names if is_reference(name)]
        raise UsageError(
            f"{' or '.join(changed)}, or a file that it imports, was changed during the run, and this stage was not "
            "stored. Restore it and repeat the command, or name another folder with --out."
        )


def load_function(reference: str) -> Callable[..., Any]:
    """Return the function of ``file.py:function``; this runs the file.

    Raises:
        UsageError: the file does not exist, cannot be run, or lacks the function.
    """
    path, name = locate(reference)
    return _function(path, name, user_code.read(path))


def call(spec: ModelSpec, kwargs: dict[str, Any]) -> nn.Module:
    """Run the user's function and return its module.

    ``num_classes`` and ``in_chans`` are passed if the function accepts them. The file can import modules of its own
    folder, also while the module runs.

    Args:
        spec: specification whose `arch` is the reference.
        kwargs: further keyword arguments.

    Raises:
        UsageError: the file or what it imports has changed since `spec` was made, cannot be run or lacks the function,
            or the function does not accept an argument, fails or returns no module. The message names file and line.
    """
    path, name = locate(spec.arch)
    code = user_code.read(path)
    if spec.source_sha256 and code.sha256 != spec.source_sha256:
        helpers = f" (or a file that it imports: {', '.join(code.helpers)})" if code.helpers else ""
        raise UsageError(
            f"{path}{helpers} has changed: the model was made with sha256 {spec.source_sha256[:12]}…, it is now "
            f"{code.sha256[:12]}…. Restore that version, or give the weights as a plain state_dict with --arch."
        )
    function = _function(path, name, code)
    accepted = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    offered = {"num_classes": spec.num_classes, "in_chans": spec.input_size[0]}
    arguments = {key: value for key, value in offered.items() if key in accepted} | kwargs
    for key in kwargs:
        if key not in accepted and not anything:
            raise UsageError(f"{spec.arch} takes no argument {key!r}; it takes {', '.join(accepted) or 'none'}")
    try:
        model = function(**arguments)
    except RobustPruneError:
        raise
    except (Exception, SystemExit) as error:  # any error of the user's code is reported as theirs
        raise UsageError(f"{spec.arch} failed: {blame(error, spec.arch)}{_message(error)}{code.hint(error)}") from error
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
    """Return ``"file.py:12: "`` for the innermost line of the user's files in the traceback, else an empty string."""
    if not is_reference(arch):
        return ""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    path = locate(arch)[0]
    names = {str(file): file for file in user_code.read(path).files} | {str(path.resolve()): path}
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{names[frame.filename]}:{frame.lineno}: " for frame in frames if frame.filename in names]
    return lines[-1] if lines else ""


def _function(path: Path, name: str, code: user_code.UserCode) -> Callable[..., Any]:
    try:
        module = user_code.run(code)
    except RobustPruneError:
        raise
    except (Exception, SystemExit) as error:  # see `call`
        said = f"{blame(error, f'{path}:{name}')}{_message(error)}{code.hint(error)}"
        raise UsageError(f"{path} cannot be run: {said}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{path} has no function {name!r}.{did_you_mean(name, known)}")
    return function


def _message(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())[:300]
