"""robust-prune cache."""

from __future__ import annotations

from datetime import UTC, datetime

from cyclopts import App
from rich.markup import escape
from rich.table import Table

from ..console import console
from ..printable import printable
from .flags import CacheFlag

app = App(name="cache", help="List or remove results that commands share.")


@app.command
def ls(*, cache: CacheFlag = None) -> None:
    """List the stored results, those used last first; times are in UTC.

    Example: robust-prune cache ls
    """
    from ..report.text import file_size
    from ..runs.cache import LIMIT, Cache, moment

    store = Cache.named(cache)
    if store.folder is None:
        console.print("The cache is switched off: it has no folder.")
        return
    entries = store.entries()
    table = Table("result", "size", "took", "stored", "last used", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in entries:
        used = datetime.fromtimestamp(entry.used, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(
            escape(printable(entry.what)), file_size(entry.size), f"{entry.seconds:.0f} s", moment(entry), used
        )
    if entries:
        console.print(table)
    total = file_size(sum(entry.size for entry in entries)) if entries else "0 bytes"
    count = f"{len(entries)} result{'' if len(entries) == 1 else 's'}"
    console.print(f"{count}, {total} of at most {file_size(LIMIT)}, in {store.folder}", markup=False)


@app.command
def clear(*, cache: CacheFlag = None) -> None:
    """Remove all stored results; run folders are not touched.

    Example: robust-prune cache clear
    """
    from ..runs.cache import Cache

    store = Cache.named(cache)
    if store.folder is None:
        console.print("The cache is switched off: it has no folder.")
        return
    removed = store.shrink(0)
    console.print(f"{removed} result{'' if removed == 1 else 's'} removed from {store.folder}", markup=False)
