"""Formatting of numbers and names for people."""

from __future__ import annotations

from datetime import datetime

from ..bench.types import Ratio
from ..evaluation.card import Accuracy, ResultCard

MINUS = "\u2212"
TIMES = "\u00d7"
NONE = "\u2013"
NO_DIFFERENCE = "no difference"
NOT_TOLD_APART = "not told apart"
ATTACK_NAMES = {"apgd": "APGD", "aa-fast": "AA-fast", "standard": "AutoAttack"}
"""Short names of the tiers that run more than one attack."""


def quantity(value: float) -> str:
    """Return a count with a decimal prefix: ``160.2 M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:.0f}"


def file_size(count: int | None) -> str:
    """Return bytes with a decimal prefix: ``1.10 MB``; a dash for None."""
    if count is None:
        return NONE
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count} B"


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign, with a typographic minus."""
    text = f"{value:+.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", MINUS)


def relative(after: float | None, before: float | None) -> str:
    """Return the relative change in per cent: ``-50.0 %``; empty if one value is unknown."""
    if after is None or not before:
        return ""
    return f"{signed(100 * (after / before - 1))} %"


def percent(share: float, digits: int = 1) -> str:
    """Return a share in [0, 1] in per cent."""
    return f"{100 * share:.{digits}f} %"


def decimals(milliseconds: float) -> int:
    """Return the number of decimals that give a duration in milliseconds three significant digits."""
    return 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2 if milliseconds >= 1 else 3


def span(low: float, high: float, digits: int) -> str:
    """Return an interval: ``[42.2, 44.1]``."""
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def accuracy_span(accuracy: Accuracy) -> str:
    """Return the 95 % interval in per cent: ``[42.2, 44.1]``."""
    low, high = accuracy.interval
    return span(100 * low, 100 * high, 1)


def points(after: Accuracy | None, before: Accuracy | None) -> str:
    """Return the difference of two accuracies: ``-1.2 points [-2.0, -0.4]``; empty if one is unknown.

    The 95 % interval is that of paired images, and stands only if both accuracies kept their verdicts; if 0 is inside,
    ``not told apart`` precedes.
    """
    if after is None or before is None or not after.total or not before.total:
        return ""
    found = f"{signed(100 * (after.value - before.value))} points"
    bounds = after.change_from(before)
    if bounds is None:
        return found
    low, high = bounds
    found = f"{found} [{', '.join(signed(100 * bound) for bound in bounds)}]"
    return f"{NOT_TOLD_APART}, {found}" if low <= 0 <= high else found


def without_interval(change: str) -> str:
    """Return a change in few words: what precedes its interval, or only that there is no difference to be seen."""
    doubt = next((words for words in (NO_DIFFERENCE, NOT_TOLD_APART) if change.startswith(words)), "")
    return doubt or change.partition(" [")[0]


def speedup(ratio: Ratio | None) -> str:
    """Return a speed-up with its interval, preceded by ``no difference`` within the noise floor; empty for None."""
    if ratio is None:
        return ""
    text = f"{ratio.value:.2f}{TIMES} {span(ratio.low, ratio.high, 2)}"
    return f"{NO_DIFFERENCE}, {text}" if ratio.verdict == NO_DIFFERENCE else text


def short_speedup(ratio: Ratio | None) -> str:
    """Return a speed-up without its interval; ``=`` within the noise floor, empty for None."""
    if ratio is None:
        return ""
    return "=" if ratio.verdict == "no difference" else f"{ratio.value:.3g}{TIMES}"


def attack_name(card: ResultCard) -> str:
    """Return the short name of the attack, e.g. ``PGD-20`` or ``AutoAttack``."""
    if card.tier in ATTACK_NAMES:
        return ATTACK_NAMES[card.tier]
    return card.attack.split(",")[0].split(":")[0]


def threat_name(card: ResultCard) -> str:
    """Return the threat model, e.g. ``Linf 8/255``."""
    return str(card.threat)


def moment(iso: str) -> str:
    """Return an ISO 8601 time to the minute, ``2026-01-02 03:04 UTC``; other text is returned unchanged."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when:%Y-%m-%d %H:%M %Z}".strip()


def short_names(names: list[str]) -> dict[str, str]:
    """Return module names, by name, without the dotted prefix that all of them share."""
    if not names:
        return {}
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return {name: ".".join(p[shared:]) for name, p in zip(names, parts, strict=True)}
