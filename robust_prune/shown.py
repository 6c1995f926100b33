"""Display of values in terminals and notebooks."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

HTML_WIDTH = 100


class Shown(ABC):
    """Base class of values with a short `repr` and a table in notebooks."""

    @abstractmethod
    def short(self) -> str:
        """Return the text inside the parentheses of the `repr`."""

    def table(self) -> RenderableType | None:
        """Return what a notebook shows; None for the `repr`."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.short()})"

    def _repr_html_(self) -> str | None:
        table = self.table()
        return None if table is None else as_html(table)


def as_html(renderable: RenderableType) -> str:
    """Return a rich renderable as HTML with inline styles."""
    from rich.console import Console

    # In a notebook rich would display what it prints, beside the HTML that is returned here.
    console = Console(record=True, width=HTML_WIDTH, file=io.StringIO(), force_terminal=True, force_jupyter=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>')
