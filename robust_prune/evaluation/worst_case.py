"""The worst points that an attack finds for one batch of images."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..attacks import ThreatModel, pgd
from .scoring import CountedModel, Precision, WorstPoint, check_points, score


def worst_points(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int,
    seed: int,
    batch: int = 0,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor, CountedModel]:
    """Attacks images that are right as they are; each restart works only on the survivors of those before.

    Args:
        model: in eval mode with frozen parameters (`frozen_eval`).
        x, y: images [N, C, H, W] in [0, 1] and labels [N], all classified rightly.
        threat, steps, restarts, seed, precision: as in `evaluate`.
        batch: position of the batch in the whole evaluation; with `seed` and the restart it seeds the random starts.

    Returns:
        survives (bool [N]); the misclassified point of each image, or the one of highest fp32 cross-entropy that was
        found where it survives ([N, C, H, W]); and the counters of passes.

    Raises:
        QualityGateError: the attack returned a point outside the threat model.
    """
    attack, judge = CountedModel(model, precision), CountedModel(model)
    right = torch.ones(len(x), dtype=torch.bool, device=x.device)
    worst = x.clone()
    worst_loss = torch.full((len(x),), -torch.inf, device=x.device)
    for restart in range(restarts):
        left = right.nonzero().flatten()
        if len(left) == 0:
            break
        generator = torch.Generator().manual_seed(start_seed(seed, batch, restart))
        here, labels = x[left], y[left]
        points = pgd(attack, here, labels, threat, steps=steps, generator=generator, objective=WorstPoint(labels))
        check_points(points, here, threat)
        predicted, loss = score(judge, points, labels)
        wins = (predicted != labels) | (loss > worst_loss[left])
        worst[left[wins]] = points[wins]
        worst_loss[left[wins]] = loss[wins]
        right[left] = predicted == labels
    attack.forwards += judge.forwards
    return right, worst, attack


def start_seed(seed: int, batch: int, restart: int) -> int:
    """Seed of one restart of one batch: a 63-bit hash, so that neighbours share no random numbers."""
    text = f"{seed}/{batch}/{restart}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
