"""Sensitivity profiles as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ..console import FirstThatFits
from .profile import SensitivityProfile

BAR_WIDTH = 16


def render_table(profile: SensitivityProfile) -> FirstThatFits:
    """Return a table with one row for each module in order of execution: MRS, rank (1 is the highest) and a bar.

    Where it does not fit, the bar, the norms and the kinds of the modules are left out, in this order.
    """
    optional = ("log scale", "weight norm", "kind")
    below = f"Robust loss {profile.base_loss:.3f} nats; MRS is its largest rise found."
    return FirstThatFits(*(_table(profile, optional[:count]) for count in range(len(optional) + 1)), below=below)


def _table(profile: SensitivityProfile, left_out: Sequence[str]) -> Table:
    table = Table(
        title=f"Module robustness sensitivity ({profile.estimator}, rho {profile.rho:g}, {profile.images} images)",
    )
    values = [module.mrs for module in profile.modules]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks = {index: rank + 1 for rank, index in enumerate(order)}
    columns = {
        "#": [str(index) for index in range(len(values))],
        "module": [escape(module.name) or "(model)" for module in profile.modules],
        "kind": [escape(module.kind) for module in profile.modules],
        "weight norm": [f"{module.weight_norm:.3g}" for module in profile.modules],
        "MRS": [f"{module.mrs:.3g}" for module in profile.modules],
        "rank": [str(ranks[index]) for index in range(len(values))],
        "log scale": ["█" * round(BAR_WIDTH * _log_share(value, values)) for value in values],
    }
    shown = {heading: cells for heading, cells in columns.items() if heading not in left_out}
    for heading in shown:
        left = heading in ("module", "kind", "log scale")
        folds = heading == "module"
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not folds)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def _log_share(value: float, values: list[float]) -> float:
    """Map `value` to [0, 1], log-scaled between a tenth of the smallest and the largest positive value."""
    positive = [v for v in values if v > 0]
    if value <= 0 or not positive:
        return 0.0
    low, high = math.log(min(positive) / 10), math.log(max(positive))
    return (math.log(value) - low) / (high - low)
