"""Random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scoring import Scoring


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return uniform random scores in [0, 1) from the seed."""
    generator = torch.Generator().manual_seed(asked.seed)
    return {g.name: torch.rand(g.channels, generator=generator, dtype=torch.float64) for g in asked.groups}
