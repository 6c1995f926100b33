"""Terminal output: a shared console, and progress bars, which are plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import distributed

console = Console(highlight=False, quiet=not distributed.is_first())
errors = Console(stderr=True, highlight=False)

Advance = Callable[..., None]
PLAIN_INTERVAL_SECONDS = 15.0


@contextmanager
def track(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show the progress of a stage.

    Args:
        description: description of the stage, e.g. ``"PGD-20, 2 restarts"``.
        total: number of units.
        done: number of units completed by an interrupted run.

    Yields:
        ``advance(count=1, note=None)``, to be called after each unit; `note` replaces the text next to the bar.
    """
    if console.is_terminal:
        with _bar() as bar:
            task = bar.add_task(description, total=total, completed=done, note="")

            def advance(count: int = 1, note: str | None = None) -> None:
                bar.update(task, advance=count)
                if note is not None:
                    bar.update(task, note=note)

            yield advance
        return
    with _plain(description, total, done) as advance_plain:
        yield advance_plain


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
    )


def warn(text: str) -> None:
    """Print a note that the user must not miss, unless `text` is empty."""
    if text:
        console.print(f"Note: {text}", markup=False)


@contextmanager
def _plain(description: str, total: int, done: int) -> Iterator[Advance]:
    begin = last = time.monotonic()
    start = done
    note_now = ""

    def advance(count: int = 1, note: str | None = None) -> None:
        nonlocal done, last, note_now
        done += count
        note_now = note if note is not None else note_now
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_SECONDS and done < total:
            last = now
            left = (now - begin) / max(done - start, 1) * (total - done)
            console.print(f"{description}: {done}/{total}, about {left:.0f} s left {note_now}".rstrip(), markup=False)

    yield advance
    elapsed = time.monotonic() - begin
    if elapsed >= 2:
        console.print(f"{description}: done in {elapsed:.0f} s {note_now}".rstrip(), markup=False)
