"""Worst points that the attacks of a tier find for a batch of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import ThreatModel, apgd, pgd
from ..attacks.objectives import Watch, cross_entropy, margin
from ..attacks.projections import random_start
from ..models.layout import tf32
from .autoattack import StandardEnsemble
from .files import FileVerdicts
from .scoring import CountedModel, Precision, WorstPoint, check_points, score
from .stages import APGD_STEPS, Stage

PGD_OBJECTIVES = (margin, cross_entropy)
"""Objectives of PGD's restarts, in turn; `stages.attack_line` names them."""


@dataclass(frozen=True)
class Attacker:
    """Runs the stages of a tier on batches of images.

    Attributes:
        model: the model, in eval mode with frozen parameters (`frozen_eval`).
        threat: norm and radius, > 0.
        classes: number of logits.
        steps, restarts: steps and random restarts of PGD.
        seed: random seed of the attacks.
        precision: precision of the gradients; scoring is in fp32, and so is the ensemble of the ``standard`` tier.
    """

    model: nn.Module
    threat: ThreatModel
    classes: int
    steps: int
    restarts: int
    seed: int
    precision: Precision = "fp32"

    def run(
        self, stage: Stage, x: Tensor, y: Tensor, batch: int, files: FileVerdicts | None = None
    ) -> tuple[Tensor, Tensor, CountedModel]:
        """Run one stage on one batch.

        Args:
            stage: a stage of the tier.
            x, y: correctly classified images [N, C, H, W] in [0, 1] and their labels [N].
            batch: position of the batch in the stage; with the seed and the stage it seeds the attack.
            files: exported files that are asked at every iterate of our own attacks; their verdicts are updated.

        Returns:
            Whether each image survives (bool [N]); the worst point of each image [N, C, H, W], which is misclassified
            if the image does not survive; and the counters of passes.

        Raises:
            QualityGateError: the attack returned a point outside the threat model.
            UsageError, EnvironmentProblem: as `StandardEnsemble`.
        """
        if stage.kind == "pgd":
            return worst_points(
                self.model, x, y, self.threat, steps=self.steps, restarts=self.restarts, seed=self.seed, batch=batch,
                precision=self.precision, files=files,
            )  # fmt: skip
        counted = CountedModel(self.model, self.precision if stage.kind != "ensemble" else "fp32")
        judge = CountedModel(self.model)
        if stage.kind == "ensemble":
            ensemble = StandardEnsemble(counted, self.threat, self.classes, self.seed, x.device)
            points = ensemble.points(stage.name, x, y)
        else:
            points = self._apgd(stage, counted, judge, x, y, batch, files.watch if files is not None else None)
        check_points(points, x, self.threat)
        survives = score(judge, points, y)[0] == y
        counted.forwards += judge.forwards
        return survives, points, counted

    # More than eight parameters: those of `run`, its two counters and the watch.
    def _apgd(
        self,
        stage: Stage,
        counted: CountedModel,
        judge: CountedModel,
        x: Tensor,
        y: Tensor,
        batch: int,
        watch: Watch | None,
    ) -> Tensor:
        def exact(images: Tensor) -> Tensor:
            with tf32(False):
                logits: Tensor = judge(images)
                return logits

        target = None
        if stage.kind == "apgd-t":
            with torch.no_grad():
                others = exact(x).scatter(1, y[:, None], -torch.inf)
            target = others.argsort(dim=1, descending=True)[:, stage.rank - 1]
        return apgd(
            counted, x, y, self.threat,
            loss="ce" if stage.kind == "apgd-ce" else "dlr",
            target=target,
            steps=APGD_STEPS,
            generator=torch.Generator().manual_seed(start_seed(self.seed, batch, f"{stage.name} {stage.rank}")),
            judge=exact if self.precision == "bf16" or x.is_cuda else None,
            watch=watch,
        )  # fmt: skip


# More than eight parameters: the images, the attack's settings, the two that seed it, and the files that watch.
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
    files: FileVerdicts | None = None,
) -> tuple[Tensor, Tensor, CountedModel]:
    """Attack correctly classified images with PGD on the margin and on the cross-entropy.

    The restarts climb the two objectives in turn, and each attacks only the survivors of the previous ones, and images
    on which one of the files stands. Two restarts on the cross-entropy cost the same and leave 3 to 4 points more on
    cuts of the demo (`benchmarks/results/attack_gap.md`).

    Args:
        model: the model, in eval mode with frozen parameters (`frozen_eval`).
        x, y: correctly classified images [N, C, H, W] in [0, 1] and their labels [N].
        threat: norm and radius.
        steps, restarts: PGD steps and random restarts.
        seed: random seed of the starts.
        batch: position of the batch in the evaluation; with `seed` and the restart it seeds the random starts.
        precision: precision of the gradients; scoring is in fp32.
        files: exported files that are asked at every iterate; they have no effect on the verdicts on the model.

    Returns:
        Whether each image survives (bool [N]); the worst point of each image [N, C, H, W], which is misclassified or,
        if the image survives, has the highest fp32 cross-entropy found; and the counters of passes.

    Raises:
        QualityGateError: the attack returned a point outside the threat model.
    """
    attack, judge = CountedModel(model, precision), CountedModel(model)
    right = torch.ones(len(x), dtype=torch.bool, device=x.device)
    worst = x.clone()
    worst_loss = torch.full((len(x),), -torch.inf, device=x.device)
    for restart in range(restarts):
        left = (right if files is None else right | files.any_standing.to(x.device)).nonzero().flatten()
        if len(left) == 0:
            break
        # Drawn for the whole batch, so that an image's start does not depend on which others are left.
        start = random_start(x, threat, torch.Generator().manual_seed(start_seed(seed, batch, restart)))
        here, labels = x[left], y[left]
        points = pgd(
            attack, here, labels, threat,
            steps=steps, objective=WorstPoint(labels, PGD_OBJECTIVES[restart % len(PGD_OBJECTIVES)]),
            start=start[left], watch=None if files is None else files.of_rows(left),
        )  # fmt: skip
        check_points(points, here, threat)
        predicted, loss = score(judge, points, labels)
        fell = predicted != labels
        wins = fell | (right[left] & (loss > worst_loss[left]))
        worst[left[wins]] = points[wins]
        worst_loss[left[wins]] = loss[wins]
        right[left] &= ~fell
    attack.forwards += judge.forwards
    return right, worst, attack


def start_seed(seed: int, batch: int, restart: int | str) -> int:
    """Return the seed of a restart or stage of a batch: a 63-bit hash, so that no two share random numbers."""
    text = f"{seed}/{batch}/{restart}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
