"""The table of sensitivities."""

from __future__ import annotations

import io

from builders.sensitivity_models import settings
from rich.console import Console
from torch import nn

from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.sensitivity.display import render_table
from robust_prune.sensitivity.estimators import measure


def test_the_table_ranks_modules(resnet: nn.Module, adv: AdversarialSet) -> None:
    profile = measure(resnet, adv, settings(estimator="gradient"))
    console = Console(record=True, width=140, quiet=False, file=io.StringIO())
    console.print(render_table(profile))
    rows = [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines()]
    shown = {cells[2]: cells for cells in rows if len(cells) == 9}
    ranked = sorted(profile.modules, key=lambda m: -m.mrs)
    assert set(shown) == {module.name for module in ranked}
    for rank, module in enumerate(ranked, start=1):
        *_, mrs, place, bar, _ = shown[module.name]
        assert (mrs, place) == (f"{module.mrs:.3g}", str(rank))
        # The least of those that were felt is still seen.
        assert ("█" in bar) == (module.mrs > 0)
    assert shown[ranked[0].name][-2] == "█" * 16 and ranked[-1].name == "unused"
