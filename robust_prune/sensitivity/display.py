"""A sensitivity profile as a table and as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.table import Table

from ..errors import UsageError
from ..runs.files import atomic_write
from .profile import SensitivityProfile

BAR_WIDTH = 16
MAX_LABELS = 60
# Okabe & Ito's palette, told apart by readers with colour-blindness too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def render_table(profile: SensitivityProfile) -> Table:
    """One row a module in order of execution: MRS, its rank (1 is the most sensitive) and a bar on a log scale."""
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
    """Where `value` lies between a tenth of the smallest and the largest positive value, on a log scale in [0, 1]."""
    positive = [v for v in values if v > 0]
    if value <= 0 or not positive:
        return 0.0
    low, high = math.log(min(positive) / 10), math.log(max(positive))
    return (math.log(value) - low) / (high - low)


def draw_profile(profile: SensitivityProfile, path: Path) -> None:
    """Draws MRS by depth as bars on a log scale, coloured by kind of module.

    Args:
        profile: what to draw; modules of MRS 0 leave a gap.
        path: where to; the suffix chooses the format (png, svg, pdf).

    Raises:
        UsageError: a suffix that names no image format.
        EnvironmentProblem: the file cannot be written.
    """
    form = path.suffix.lstrip(".").lower()
    figure = Figure(figsize=(min(24.0, max(7.0, 1.5 + 0.28 * len(profile.modules))), 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if form not in canvas.get_supported_filetypes():
        raise UsageError(
            f"cannot draw to {path.name}: {form!r} is no image format. End the name in .png, .svg or .pdf."
        )
    _fill(figure, profile)
    atomic_write(path, lambda part: canvas.print_figure(part, format=form, dpi=130))


def _fill(figure: Figure, profile: SensitivityProfile) -> None:
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(module.kind for module in profile.modules))
    colour = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    values = [module.mrs for module in profile.modules]
    positive = [v for v in values if v > 0]
    axes.bar(range(len(values)), values, color=[colour[m.kind] for m in profile.modules], width=0.8)
    if positive:
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 2, max(positive) * 2)
    stride = math.ceil(len(values) / MAX_LABELS)
    shown = range(0, len(values), stride)
    axes.set_xticks(list(shown), [profile.modules[i].name for i in shown], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(values) - 0.3)
    axes.set_xlabel("module, in order of execution")
    axes.set_ylabel(f"MRS at ρ = {profile.rho:g} (nats)")
    axes.set_title(f"Module robustness sensitivity: {profile.estimator}, {profile.images} adversarial images")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(handles=[Patch(color=colour[kind], label=kind) for kind in kinds], frameon=False, fontsize=8)
