"""robust-prune recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from ..console import console
from ..errors import UsageError
from ..recipe_docs import KeyDoc, SectionDoc, describe
from ..recipe_docs import find as find_key
from ..recipe_reader import find, load, read, shipped, with_threat_of
from ..runs.files import write_text
from .common import check_out_file

WIDTH = 80
"""Columns that explanations fill at most: lines of prose are hard to read across a whole screen."""

app = App(name="recipes", help="List, show or copy the shipped recipes, and explain their keys.")


@app.command
def ls() -> None:
    """List the shipped recipes with the first line of their headers.

    Example: robust-prune recipes ls
    """
    table = Table("recipe", "what it does", box=None)
    for name, path in shipped().items():
        table.add_row(name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    console.print(table)


@app.command
def show(
    name: Annotated[str, Parameter(help="A shipped recipe's name, or a file.")],
    /,
    *,
    resolved: Annotated[
        bool, Parameter(negative="", help="Print every value, defaults too.", show_default=False)
    ] = False,
) -> None:
    """Print a recipe.

    Example: robust-prune recipes show demo
    """
    text = with_threat_of(load(name), None).to_yaml() if resolved else read(find(name))
    console.print(text, markup=False, soft_wrap=True, end="")


@app.command
def cp(
    name: Annotated[str, Parameter(help="A shipped recipe's name.")],
    to: Annotated[Path, Parameter(help="The file or folder to write to; an existing file is kept and reported.")],
    /,
) -> None:
    """Copy a shipped recipe to a file of your own.

    Example: robust-prune recipes cp cifar10-resnet18 mine.yaml
    """
    text = read(find(name))
    to = to / find(name).name if to.is_dir() else to
    if to.exists():
        raise UsageError(f"{to} exists already. Name another file.")
    check_out_file("recipes cp", to)
    write_text(to, text)
    console.print(f"{to}", markup=False)


@app.command
def explain(
    key: Annotated[
        str | None, Parameter(help="A key such as finetune.lr, or a section such as pruning; all of them by default.")
    ] = None,
    /,
) -> None:
    """Say what a key of a recipe means: its type, limits, default and choices.

    Example: robust-prune recipes explain finetune.lr
    """
    if key is None:
        _print(_overview())
        console.print("\nMore on each: robust-prune recipes explain KEY, e.g. pruning.ratio or pruning")
        return
    found = find_key(key)
    _print(Text(f"{found.name}\n", style="bold"))
    _print(Text(f"{found.text}\n"))
    _print(_section(found) if isinstance(found, SectionDoc) else _key(found))


def _print(shown: Table | Text) -> None:
    console.print(shown, width=min(WIDTH, console.width))


def _overview() -> Table:
    table = Table.grid(padding=(0, 2))
    for section in describe():
        table.add_row(Text(section.name, style="bold"), Text(section.text))
        table.add_row("", Text(", ".join(key.short_name for key in section.keys), style="dim"))
    return table


def _section(section: SectionDoc) -> Table:
    table = Table("key", "default", "what it means", box=None, padding=(0, 2, 0, 0))
    for key in section.keys:
        table.add_row(Text(key.short_name), Text(key.default), Text(key.text))
    return table


def _key(key: KeyDoc) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("type", Text(key.kind))
    table.add_row("default", Text(key.default))
    if any(choice.help for choice in key.choices):
        choices = Table.grid(padding=(0, 2))
        for choice in key.choices:
            choices.add_row(Text(choice.name), Text(choice.help))
        table.add_row("choices", choices)
    elif key.choices:
        table.add_row("choices", Text(", ".join(choice.name for choice in key.choices)))
    return table
