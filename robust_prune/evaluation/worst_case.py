"""Worst points that the attacks of a tier find for a batch of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import ThreatModel, apgd, pgd
from ..models.layout import tf32
from .autoattack import StandardEnsemble
from .scoring import CountedModel, Precision, WorstPoint, check_points, score
from .stages import APGD_STEPS, Stage


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

    def run(self, stage: Stage, x: Tensor, y: Tensor, batch: int) -> tuple[Tensor, Tensor, CountedModel]:
        """Run one stage on one batch.

        Args:
            stage: a stage of the tier.
            x, y: correctly classified images [N, C, H, W] in [0, 1] and their labels [N].
            batch: position of the batch in the stage; with the seed and the stage it seeds the attack.

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
                precision=self.precision,
            )  # fmt: skip
        counted = CountedModel(self.model, self.precision if stage.kind != "ensemble" else "fp32")
        judge = CountedModel(self.model)
        if stage.kind == "ensemble":
            ensemble = StandardEnsemble(counted, self.threat, self.classes, self.seed, x.device)
            points = ensemble.points(stage.name, x, y)
        else:
            points = self._apgd(stage, counted, judge, x, y, batch)
        check_points(points, x, self.threat)
        survives = score(judge, points, y)[0] == y
        counted.forwards += judge.forwards
        return survives, points, counted

    def _apgd(
        self, stage: Stage, counted: CountedModel, judge: CountedModel, x: Tensor, y: Tensor, batch: int
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
        )  # fmt: skip


# More than eight parameters: the images, the attack's settings, and the two that seed it.
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
    """Attack correctly classified images with PGD; each restart attacks only the survivors of the previous ones.

    Args:
        model: the model, in eval mode with frozen parameters (`frozen_eval`).
        x, y: correctly classified images [N, C, H, W] in [0, 1] and their labels [N].
        threat: norm and radius.
        steps, restarts: PGD steps and random restarts.
        seed: random seed of the starts.
        batch: position of the batch in the evaluation; with `seed` and the restart it seeds the random starts.
        precision: precision of the gradients; scoring is in fp32.

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


def start_seed(seed: int, batch: int, restart: int | str) -> int:
    """Return the seed of a restart or stage of a batch: a 63-bit hash, so that no two share random numbers."""
    text = f"{seed}/{batch}/{restart}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
