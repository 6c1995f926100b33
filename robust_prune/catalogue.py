"""Catalogues of named choices, such as channel criteria; each choice is a Python file that is found without running it.

Recipes, help texts and documentation take names and help lines from here; torch is imported only if a choice is used.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .errors import UsageError
from .printable import one_line

_ROOT = Path(__file__).parent


def is_reference(name: str) -> bool:
    """Return whether `name` has the form of users' code, ``file.py:function`` or ``file.py``."""
    return name.endswith(".py") or ".py:" in name


@dataclass(frozen=True)
class Catalogue:
    """Choices of one kind.

    Each choice of this package is a file in `folder`. The name of the file is the name of the choice, the first line of
    its docstring is the help line, and its function `function` implements it. Other packages add choices by entry
    points ``name = "module:function"`` of the group ``robust_prune.<folder>``. A user's ``file.py:function`` is a
    choice, too.

    Attributes:
        kind: name of the kind in messages, e.g. ``criterion``.
        folder: sub-package of the choices, e.g. ``ranking.criteria``.
        function: name of the function in each file.
        separator: character that replaces the underscores of file names.
    """

    kind: str
    folder: str
    function: str
    separator: str = "_"

    @cached_property
    def choices(self) -> dict[str, str]:
        """Help line of each choice by name: choices of this package in alphabetical order, then of other packages."""
        ours = {name: _first_line(file) for name, file in self._files.items()}
        return ours | {name: f"from {point.value}" for name, point in sorted(self._plugins.items()) if name not in ours}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all choices, without users' files."""
        return tuple(self.choices)

    def help(self) -> str:
        """Return all names as one text, for help texts."""
        return f"{', '.join(self.names)}, or file.py:function"

    def check(self, name: str) -> str:
        """Return `name` if it is a choice or the form of a user's file.

        Raises:
            ValueError: it is neither; the message lists all names.
        """
        if name not in self.choices and not is_reference(name):
            raise ValueError(f"must be one of {self.help()}")
        return name

    def load(self, name: str) -> Any:
        """Return the function of a choice.

        Raises:
            UsageError: there is no such choice, the user's file cannot be run, or the package cannot be imported.
        """
        from .models import user_file

        if is_reference(name):
            return user_file.load_function(name)
        if name in self._plugins and name not in self._files:
            return self._from_plugin(self._plugins[name])
        if name not in self._files:
            raise UsageError(f"{self.kind} must be one of {self.help()}, got {name!r}")
        return getattr(importlib.import_module(f"robust_prune.{self.folder}.{self._files[name].stem}"), self.function)

    def is_builtin(self, name: str) -> bool:
        """Return whether a choice is one of this package, which loads for certain."""
        return name in self._files

    def _from_plugin(self, point: Any) -> Any:
        package = point.dist.name if point.dist is not None else "a package"
        try:
            found = point.load()
        except Exception as error:  # other people's code may raise any error when it is imported
            said = one_line(error, 200)
            raise UsageError(
                f"{self.kind} {point.name!r} of {package} ({point.value}) cannot be imported: {said}. Repair or "
                f"uninstall {package}."
            ) from error
        if not callable(found):
            raise UsageError(f"{self.kind} {point.name!r} of {package} ({point.value}) is not a function.")
        return found

    def _name(self, file: Path) -> str:
        # `global_.py` is "global", which is a keyword and cannot be the name of a module.
        return file.stem.rstrip("_").replace("_", self.separator)

    @cached_property
    def _files(self) -> dict[str, Path]:
        files = sorted((_ROOT / self.folder.replace(".", "/")).glob("*.py"))
        return {self._name(file): file for file in files if file.stem != "__init__"}

    @cached_property
    def _plugins(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=f"robust_prune.{self.folder}")}


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".")


CRITERIA = Catalogue("criterion", "ranking.criteria", "score")
ALLOCATIONS = Catalogue("allocation", "budget.allocations", "wished_widths")
LOSSES = Catalogue("loss", "training.loss_functions", "loss")
TIERS = Catalogue("tier", "evaluation.tiers", "stages", separator="-")
CATALOGUES = (CRITERIA, ALLOCATIONS, LOSSES, TIERS)
