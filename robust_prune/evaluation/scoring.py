"""Scoring of adversarial images: predictions in fp32, on points that are checked against the threat model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.objectives import classify
from ..attacks.projections import l2_norm
from ..attacks.threat import ThreatModel
from ..errors import QualityGateError
from ..models.layout import tf32

Precision = Literal["fp32", "bf16"]
LINF_SLACK = 1e-6
L2_SLACK = 1e-5
WRONG_BONUS = 1e4


class Rescaled(nn.Module):
    """Answers with the logits of a model times a positive factor, which changes no prediction.

    Args:
        model: maps images [N, C, H, W] to logits [N, K].
        factor: the factor, > 0.
    """

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled logits [N, K] in float32."""
        return self.factor * self.model(x).float()


class CountedModel(nn.Module):
    """Counts forward and backward passes of a model, and runs it in bf16 if asked.

    Attributes:
        model: the model.
        precision: ``fp32`` or ``bf16`` (autocast).
        forwards: number of images in forward passes.
        backwards: number of these images whose input gradient was recorded.
    """

    def __init__(self, model: nn.Module, precision: Precision = "fp32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W] in float32."""
        self.forwards += len(x)
        self.backwards += len(x) if x.requires_grad and torch.is_grad_enabled() else 0
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(x).float()


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted classes [N] and the cross-entropy [N] in nats, computed in fp32; see `classify`.

    The cross-entropy is infinite where it is not finite.
    """
    with tf32(False), torch.autocast(x.device.type, enabled=False):
        logits = model(x).float()
    loss = F.cross_entropy(logits, y, reduction="none")
    return classify(logits), torch.where(torch.isfinite(loss), loss, torch.full_like(loss, torch.inf))


class WorstPoint:
    """Attack objective that adds a large constant for misclassified points to another objective.

    The constant has no gradient, so the ascent is plain PGD. With `keep_best` the attack returns a misclassified
    iterate if it found one.

    Args:
        y: labels [N].
        objective: maps logits [N, K] and labels [N] to values [N], such as the cross-entropy or the margin.
    """

    def __init__(self, y: Tensor, objective: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.y, self.objective = y, objective

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the objective [N] of logits [N, K]."""
        wrong = (classify(logits.detach()) != self.y).float()
        # NaN compares false with every value, so a point where the model breaks down would never count as the best.
        return self.objective(logits, self.y).nan_to_num(nan=0.0) + WRONG_BONUS * wrong


def check_points(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    """Check that every adversarial image [N, C, H, W] lies in the epsilon-ball around `x` and in [0, 1].

    Raises:
        QualityGateError: an image does not or is not finite, so the attack is broken and its results would be false.
    """
    delta = x_adv - x
    if threat.norm == "linf":
        distance, limit = delta.flatten(1).abs().amax(dim=1), threat.epsilon + LINF_SLACK
    else:
        distance, limit = l2_norm(delta).flatten(), threat.epsilon * (1 + L2_SLACK) + L2_SLACK
    # "All inside" rather than "any outside", so that NaN fails.
    if not bool((distance <= limit).all()):
        raise QualityGateError(
            f"an attacked image lies {float(distance.max()):.6g} from its original, outside {threat}. "
            "The attack is broken; please report it."
        )
    if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
        raise QualityGateError("an attacked image leaves [0, 1]. The attack is broken; please report it.")
