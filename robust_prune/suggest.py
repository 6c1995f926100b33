"""Suggestions for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``" Did you mean a, b or c?"`` (with a leading space), or an empty string without similar names.

    Args:
        name: the requested name.
        known: existing names.
        prefix: prefix of each suggestion.
    """
    return question([prefix + match for match in difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)])


def question(near: Sequence[str]) -> str:
    """The same for names that are known to be near."""
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f" Did you mean {listed}?"
