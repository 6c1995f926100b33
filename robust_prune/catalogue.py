"""Named choices of one kind, such as channel criteria: one Python file each, found without being run.

Recipes, help texts and documentation read names and help lines from here; torch is imported only when a choice is used.
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

_ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Catalogue:
    """The choices of one kind.

    A choice of ours is a file of `folder`: its name is the choice's, its docstring's first line the help line, and its
    function called `function` does the work. A package that is installed beside this one adds choices as entry points
    ``name = "module:function"`` of the group ``robust_prune.<folder>``, and a user's ``file.py:function`` is one, too.

    Attributes:
        kind: in messages, e.g. ``criterion``.
        folder: of this package, with dots, e.g. ``ranking.criteria``.
        function: name of the function in each file.
        separator: what stands in names for the underscores of files.
    """

    kind: str
    folder: str
    function: str
    separator: str = "_"

    @cached_property
    def choices(self) -> dict[str, str]:
        """Help lines by name, ours first in alphabetical order, then those of other packages."""
        ours = {name: _first_line(file) for name, file in self._files.items()}
        return ours | {name: f"from {point.value}" for name, point in sorted(self._plugins.items()) if name not in ours}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the choices, without users' files."""
        return tuple(self.choices)

    def help(self) -> str:
        """All names in a sentence's form, for the help of a flag."""
        return f"{', '.join(self.names)}, or file.py:function"

    def check(self, name: str) -> str:
        """`name`, if it is a choice or has the form of a user's.

        Raises:
            ValueError: it is neither; the message lists what there is.
        """
        if name not in self.choices and ".py" not in name:
            raise ValueError(f"must be one of {self.help()}")
        return name

    def load(self, name: str) -> Any:
        """The function of a choice.

        Raises:
            UsageError: no such choice, or a user's file that cannot be run.
        """
        from .models import user_file

        if user_file.is_reference(name):
            return user_file.load_function(name)
        if name in self._plugins and name not in self._files:
            return self._plugins[name].load()
        if name not in self._files:
            raise UsageError(f"{self.kind} must be one of {self.help()}, got {name!r}")
        return getattr(importlib.import_module(f"robust_prune.{self.folder}.{self._files[name].stem}"), self.function)

    def _name(self, file: Path) -> str:
        # `global_.py` is "global", which no module of Python may be called.
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
