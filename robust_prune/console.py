"""Terminal output: a shared console, and the progress of work.

A terminal shows what is being done in one line that moves. Without one (in a pipe or a log) plain lines say it:
whenever nothing was printed for `SILENCE` seconds, and less often once the same work has lasted minutes.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.text import Text

from . import distributed

SILENCE, LONG_SILENCE, PATIENCE = 3.5, 29.0, 300.0
"""Seconds without a line after which plain output says what is being done, the same once the work has lasted
`PATIENCE` seconds, since a log of hours would otherwise have thousands of lines, and those seconds."""
WORTH_A_LINE = 2.0
"""Seconds that work must take for its end to be printed."""
WITHOUT_LIMIT = 10_000
"""Columns of output that goes to a file or to another program: lines have no end there, so nothing is folded."""
FOLDED = 24
"""Columns that a name gets where it would widen its table beyond the width."""
BAR, BAR_NEEDS = 24, 100
FRAMES = "|/-\\"

Advance = Callable[..., None]


class _Console(Console):
    """A console that knows when it last printed."""

    printed = time.monotonic()

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        self.printed = time.monotonic()


console = _Console(highlight=False, quiet=not distributed.is_first())
errors = Console(stderr=True, highlight=False)
if not (console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ):
    console.width = WITHOUT_LIMIT


def warn(text: str) -> None:
    """Print a note that the user must not miss, unless `text` is empty."""
    if text:
        console.print(f"Note: {text}", markup=False)


def alarm(text: str) -> None:
    """Print a reason why figures may not be trusted, in bold."""
    console.print(f"Alarm: {text}", markup=False, style="bold")


def duration(seconds: float) -> str:
    """Return a time given in seconds for people: ``1.5 s``, ``45 s``, ``3 min 20 s`` or ``1 h 12 min``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class FirstThatFits:
    """The first of several tables that fits into the width; the last one if none does.

    Args:
        tables: tables of the same content, from the widest to the narrowest.
        below: sentences under the table; a caption would be folded to the table's width.
    """

    def __init__(self, *tables: RenderableType, below: str = "") -> None:
        self.tables: Sequence[RenderableType] = tables
        self.below = below

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update(max_width=WITHOUT_LIMIT)
        wide = (t for t in self.tables if Measurement.get(console, free, t).maximum <= options.max_width)
        yield next(wide, self.tables[-1])
        if self.below:
            yield Text(self.below, style="table.caption")


# --- progress --------------------------------------------------------------------------------------------------------


class Pace:
    """The rate of a stage's units and the time that is left, known once enough units were done to tell.

    The rate is measured from the end of the first units on, since these include warm-up and compilation. Units of an
    interrupted run do not count.
    """

    FEWEST, SHARE, SECONDS = 10, 0.05, 3.0

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done
        self._first: tuple[int, float] | None = None
        self._last = 0.0

    def advance(self, count: int, now: float) -> None:
        """Note that `count` more units are done at the time `now`, in seconds."""
        if count:
            self.done, self._last = self.done + count, now
            self._first = self._first or (self.done, now)

    def left(self, now: float) -> float | None:
        """Return the seconds that are left at the time `now`; None as long as that cannot be told."""
        if self._first is None:
            return None
        units, seconds = self.done - self._first[0], self._last - self._first[1]
        if seconds < self.SECONDS or units < max(1, min(self.FEWEST, self.SHARE * self.total)):
            return None
        return max(0.0, seconds / units * (self.total - self.done) - (now - self._last))


@dataclass
class _Activity:
    """Work that is being done; with `pace`, a number of units of it."""

    description: str
    pace: Pace | None = None
    note: str = ""
    begin: float = field(default_factory=time.monotonic)
    since: float = 0.0  # when it last became what is shown

    def figures(self, now: float) -> str:
        left = self.pace.left(now) if self.pace else None
        seconds = f"{_whole(now - self.begin)} so far" if left is None else f"about {_whole(left)} left"
        parts = (f"{self.pace.done}/{self.pace.total}" if self.pace else "", seconds, self.note)
        return ", ".join(part for part in parts if part)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        now, bar = time.monotonic(), ""
        if self.pace and self.pace.total and options.max_width >= BAR_NEEDS:
            filled = min(BAR, BAR * self.pace.done // self.pace.total)
            bar = f" [{'#' * filled}{'.' * (BAR - filled)}]"
        line = Text(f"{FRAMES[int(8 * now) % len(FRAMES)]} {self.description}{bar} {self.figures(now)}")
        line.truncate(options.max_width, overflow="ellipsis")
        yield line


_active: list[_Activity] = []


@contextmanager
def track(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show the progress of work on a number of units; its end is printed if it took longer than a moment.

    Args:
        description: description of the work, e.g. ``"PGD-20, 2 restarts"``.
        total: number of units.
        done: number of units completed by an interrupted run.

    Yields:
        ``advance(count=1, note=None)``, to be called after each unit; `note` replaces the text next to the figures.
    """
    pace = Pace(total, done)
    activity = _Activity(description, pace)

    def advance(count: int = 1, note: str | None = None) -> None:
        pace.advance(count, time.monotonic())
        activity.note = activity.note if note is None else note

    with _shown(activity):
        yield advance
    say_end(f"{description}:", time.monotonic() - activity.begin, activity.note)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Say what is being done, and for how long, while work goes on that has no units."""
    with _shown(_Activity(description)):
        yield


def say_end(what: str, seconds: float, note: str = "") -> None:
    """Print that work is done and how long it took, in seconds, unless that was a moment."""
    if seconds >= WORTH_A_LINE:
        console.print(f"{what} done in {duration(seconds)}{', ' if note else ''}{note}", markup=False)


def _whole(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 59.5 else duration(seconds)


@contextmanager
def others_silent() -> Iterator[None]:
    """Suppress what other code prints to the standard output; this module's console goes on."""
    before = console._file
    console.file = console.file
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        console._file = before


@contextmanager
def _shown(activity: _Activity) -> Iterator[None]:
    if console.quiet:
        yield
        return
    activity.since = activity.begin
    _active.append(activity)
    try:
        with contextlib.nullcontext() if len(_active) > 1 else _moving() if console.is_interactive else _lines():
            yield
    finally:
        _active.remove(activity)
        if _active:
            _active[-1].since = time.monotonic()


def _moving() -> Live:
    return Live(get_renderable=lambda: _active[-1], console=console, refresh_per_second=8, transient=True)


@contextmanager
def _lines() -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=_speak, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _speak(stop: threading.Event) -> None:
    while not stop.wait(0.25):
        now, activity = time.monotonic(), next(iter(_active[-1:]), None)
        if activity is None or now - activity.begin < 1:
            continue
        if now - console.printed >= (SILENCE if now - activity.since < PATIENCE else LONG_SILENCE):
            console.print(f"{activity.description}: {activity.figures(now)}", markup=False)
