"""Radii of threat models: how they are read, and which are refused before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

USUAL = {"linf": "8/255", "l2": "0.5"}
"""Usual radius of each norm on CIFAR-10, as papers write it."""

_LARGEST_PIXEL = 255
_FRACTION = re.compile(r"\s*([^/]+?)\s*(?:/\s*([^/]+?)\s*)?")


def number(value: Any) -> Any:
    """Return fractions such as ``"8/255"``, and numbers written as text, as numbers; other values as they are.

    Raises:
        ValueError: `value` is a text that is neither, or a truth value.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number or a fraction such as 8/255")
    if not isinstance(value, str):
        return value
    try:
        found = _FRACTION.fullmatch(value)
        return float(found[1]) / float(found[2] or 1) if found else float(value)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError("must be a number or a fraction such as 8/255") from error


def refusal(norm: str, epsilon: float, input_size: Sequence[int] | None = None) -> str:
    """Return why a radius cannot be meant, as a sentence that follows the name of the value, or an empty string.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        epsilon: radius in units of the [0, 1] pixel range.
        input_size: (channels, height, width) of the images, whose diagonal bounds L2 radii; None for unknown.
    """
    if not 0 <= epsilon < math.inf:
        return f"must be a finite number >= 0, got {epsilon:g}. Try {USUAL.get(norm, USUAL['linf'])}."
    if norm == "linf" and epsilon > 1:
        return (
            f"must be at most 1 for linf, since pixels lie in [0, 1], got {epsilon:g}. {_pixels(epsilon, norm)} "
            "An L2 radius needs norm l2."
        )
    diagonal = math.sqrt(math.prod(input_size)) if input_size else math.inf
    if norm == "l2" and epsilon > diagonal:
        size = "x".join(map(str, input_size or ()))
        return (
            f"must be at most {diagonal:.4g} for l2, the distance from a black to a white {size} image, got "
            f"{epsilon:g}. {_pixels(epsilon, norm)}"
        )
    return ""


def _pixels(epsilon: float, norm: str) -> str:
    """Say what a radius was probably meant to be: a number of the 255 steps of a pixel."""
    return f"Did you mean {epsilon:g}/255?" if epsilon < _LARGEST_PIXEL else f"Try {USUAL[norm]}."
