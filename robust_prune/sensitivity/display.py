"""Sensitivity profiles as tables."""

from __future__ import annotations

import math

from rich.table import Table

from .profile import SensitivityProfile

BAR_WIDTH = 16


def render_table(profile: SensitivityProfile) -> Table:
    """Return a table with one row for each module in order of execution: MRS, rank (1 is the highest) and a bar."""
    table = Table(
        title=f"Module robustness sensitivity ({profile.estimator}, rho {profile.rho:g}, {profile.images} images)",
        caption=f"robust loss {profile.base_loss:.3f} nats; MRS is its largest rise found",
    )
    for heading in ("#", "module", "kind"):
        table.add_column(heading, justify="right" if heading == "#" else "left", overflow="fold")
    for heading in ("weight norm", "MRS", "rank"):
        table.add_column(heading, justify="right")
    table.add_column("log scale", no_wrap=True)
    values = [module.mrs for module in profile.modules]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks = {index: rank + 1 for rank, index in enumerate(order)}
    for index, module in enumerate(profile.modules):
        table.add_row(
            str(index),
            module.name or "(model)",
            module.kind,
            f"{module.weight_norm:.3g}",
            f"{module.mrs:.3g}",
            str(ranks[index]),
            "█" * round(BAR_WIDTH * share) if (share := _log_share(module.mrs, values)) else "",
        )
    return table


def _log_share(value: float, values: list[float]) -> float:
    """Map `value` to [0, 1], log-scaled between a tenth of the smallest and the largest positive value."""
    positive = [v for v in values if v > 0]
    if value <= 0 or not positive:
        return 0.0
    low, high = math.log(min(positive) / 10), math.log(max(positive))
    return (math.log(value) - low) / (high - low)
