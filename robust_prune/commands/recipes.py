"""robust-prune recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.table import Table

from ..console import console
from ..errors import UsageError
from ..recipe_reader import find, load, shipped

app = App(name="recipes", help="List, show or copy the shipped recipes.")


@app.command
def ls() -> None:
    """List the shipped recipes with the first line of their headers."""
    table = Table("recipe", "what it does", box=None)
    for name, path in shipped().items():
        table.add_row(name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    console.print(table)


@app.command
def show(
    name: str, *, resolved: Annotated[bool, Parameter(negative="", help="Every value, defaults too.")] = False
) -> None:
    """Print a recipe.

    Parameters
    ----------
    name
        A shipped recipe's name, or a file.
    """
    text = load(name).to_yaml() if resolved else find(name).read_text(encoding="utf-8")
    console.print(text, markup=False, soft_wrap=True, end="")


@app.command
def cp(name: str, to: Path) -> None:
    """Copy a shipped recipe to a file of your own.

    Parameters
    ----------
    name
        A shipped recipe's name.
    to
        The file to write; an existing one is kept and reported.
    """
    if to.exists():
        raise UsageError(f"{to} exists already. Name another file.")
    shutil.copyfile(find(name), to)
    console.print(f"{to}", markup=False)
