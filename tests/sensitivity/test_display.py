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
    text = console.export_text()
    top = max(profile.modules, key=lambda m: m.mrs)
    row = next(line for line in text.splitlines() if f" {top.name} " in line)
    assert "█" * 16 in row and f"{top.mrs:.3g}" in row
    assert next(line for line in text.splitlines() if " unused " in line).count("█") == 0
