"""Sizes and latencies of the pruned model that users state, as shares to remove."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..console import console
from ..errors import UsageError
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..data.base import DataBundle
    from ..models.artifact import Model
    from ..runs.cache import Cache

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_TIMES = {"": 1.0, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "s": 1e3}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(\w*)", re.IGNORECASE)
_METRICS = {"macs": "MACs", "params": "parameters", "latency": "ms"}


@dataclass(frozen=True)
class Target:
    """What the pruned model is to have.

    Attributes:
        metric: ``macs``, ``params`` or ``latency``.
        value: the number of MACs or parameters, or the latency in milliseconds, > 0.
    """

    metric: str
    value: float

    @property
    def flag(self) -> str:
        """The flag that states it."""
        return f"--target-{self.metric}"


def target_of(macs: str | None, params: str | None, latency: str | None) -> Target | None:
    """Return the target that a text such as ``50M``, ``300k`` or ``5ms`` states, or None without one.

    Args:
        macs, params, latency: at most one of them.

    Raises:
        UsageError: the text is no positive number with a known unit.
    """
    for metric, text in (("macs", macs), ("params", params), ("latency", latency)):
        if text is None:
            continue
        units, example = (_TIMES, "5ms") if metric == "latency" else (_COUNTS, "50M, 300k or 1.2G")
        found = _NUMBER.fullmatch(text.strip())
        value = float(found[1]) * units.get(found[2].lower(), 0.0) if found else 0.0
        if not 0 < value < 1e18:
            raise UsageError(f"--target-{metric} must be a positive number such as {example}, got {text[:80]!r}.")
        return Target(metric, value)
    return None


def with_target(recipe: Recipe, target: Target | None, loaded: Model, data: DataBundle, cache: Cache) -> Recipe:
    """Return the recipe with the metric and the ratio that leave what is wanted.

    The latency of the dense model is measured once for a machine and kept in the cache, so that the same command stands
    for the same ratio.

    Args:
        recipe: the recipe.
        target: the target; None leaves the recipe as it is.
        loaded: the dense model.
        data: data set, with training images for the check of the exported file.
        cache: where the latency is stored.

    Raises:
        UsageError: the dense model has no more than the target, or cannot be exported.
    """
    if target is None:
        return recipe
    dense = _dense(recipe, target, loaded, data, cache)
    unit = _METRICS[target.metric]
    if target.value >= dense:
        shown = f"{dense:.3g}" if target.metric == "latency" else f"{dense:,.0f}"
        wanted = f"{target.value:g}" if target.metric == "latency" else f"{target.value:,.0f}"
        raise UsageError(f"{target.flag} {wanted}: the dense model has {shown} {unit}. Ask for fewer.")
    ratio = 1 - target.value / dense
    if target.metric == "latency":
        from ..bench.candidates import conditions

        takes = f"The dense model takes {dense:.3g} ms ({conditions(recipe.bench)})"
        console.print(f"{takes}: {target.value:g} ms are {ratio:.1%} less.", markup=False)
    section = recipe.pruning.model_copy(update={"metric": target.metric, "ratio": ratio})
    return recipe.model_copy(update={"pruning": section})


def _dense(recipe: Recipe, target: Target, loaded: Model, data: DataBundle, cache: Cache) -> float:
    """Return what the dense model has, in the unit of the target."""
    from ..budget.counting import count_macs, count_params

    if target.metric == "macs":
        return count_macs(loaded.module.cpu(), loaded.spec.blank_image())
    if target.metric == "params":
        return count_params(loaded.module)
    from ..bench.candidates import DenseLatency, median_alone
    from ..introspect.fingerprint import models_hash
    from ..serialization import to_json

    given = [models_hash(loaded.module), to_json(loaded.spec), recipe.bench.model_dump(mode="json"), recipe.seed]
    found = cache.value(
        "Latency of the dense model", DenseLatency, given,
        lambda: median_alone(loaded.module, loaded.spec, data.train, recipe),
    )  # fmt: skip
    return found.milliseconds
