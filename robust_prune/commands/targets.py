"""Sizes of the pruned model that users state, as shares to remove."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..models.artifact import Model

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_COUNT = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgb]?)", re.IGNORECASE)


def count_of(flag: str, text: str) -> float:
    """Return the number that a text such as ``50M``, ``300k`` or ``1.2G`` stands for.

    Raises:
        UsageError: it is no positive number.
    """
    found = _COUNT.fullmatch(text.strip())
    value = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not value or value > 1e18:
        raise UsageError(f"{flag} must be a positive number such as 50M, 300k or 1.2G, got {text[:80]!r}.")
    return value


def with_target(recipe: Recipe, loaded: Model, macs: str | None, params: str | None) -> Recipe:
    """Return the recipe with the metric and the ratio that leave a wanted number of MACs or parameters.

    Args:
        recipe: the recipe.
        loaded: the dense model.
        macs, params: the wanted number, as `count_of` reads it; at most one of them.

    Raises:
        UsageError: both are given, one is no number, or the dense model has no more than it.
    """
    if macs is None and params is None:
        return recipe
    if macs is not None and params is not None:
        raise UsageError("--target-macs and --target-params are two budgets. Give one of them.")
    from ..budget.counting import count_macs, count_params

    if macs is not None:
        flag, metric, unit, wanted = "--target-macs", "macs", "MACs", count_of("--target-macs", macs)
        dense = count_macs(loaded.module.cpu(), loaded.spec.blank_image())
    else:
        assert params is not None
        flag, metric, unit, wanted = "--target-params", "params", "parameters", count_of("--target-params", params)
        dense = count_params(loaded.module)
    if wanted >= dense:
        raise UsageError(f"{flag} {wanted:,.0f}: the dense model has {dense:,} {unit}. Ask for fewer.")
    section = recipe.pruning.model_copy(update={"metric": metric, "ratio": 1 - wanted / dense})
    return recipe.model_copy(update={"pruning": section})
