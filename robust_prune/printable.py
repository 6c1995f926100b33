"""Text and numbers from outside: control characters in a name would command the terminal that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import UsageError


def printable(text: str) -> str:
    """Return `text` with characters that cannot be shown, such as escapes and halves of pairs, spelled out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the kind and the text of an error in one line of at most `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return printable(text if len(text) <= limit else text[: limit - 1] + "…")


LARGEST, DEEPEST = 2.0**63, 50


def check_plain(value: Any, what: str) -> None:
    """Hold every text and number inside a JSON value against what terminals, files and arithmetic can take.

    Raises:
        UsageError: a text has characters that are not printable (line breaks and tabs are), the size of a number is
            above 2^63, or values lie more than `DEEPEST` levels deep.
    """
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > DEEPEST:
            raise UsageError(f"{what} holds values inside each other, which no robust-prune has written.")
        if isinstance(item, str) and not all(c.isprintable() or c in "\n\t" for c in item):
            raise UsageError(
                f"{what} holds control characters in '{printable(item)[:80]}', which no robust-prune has written. "
                "Look where it comes from."
            )
        if isinstance(item, int | float) and abs(item) > LARGEST:
            raise UsageError(f"{what} holds the number {str(item)[:20]}, which no robust-prune has written.")
        if isinstance(item, Mapping):
            waiting += [(part, depth + 1) for part in (*item, *item.values())]
        elif isinstance(item, list | tuple):
            waiting += [(part, depth + 1) for part in item]
