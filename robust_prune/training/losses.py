"""Common parts of adversarial training losses; each loss is a file of `training/loss_functions` (`catalogue.LOSSES`).

A user's own loss is a ``file.py:function`` that is called as ``function(model, batch)`` and returns a `LossResult` or a
scalar tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import ThreatModel, frozen_eval, pgd
from ..catalogue import LOSSES
from ..errors import UsageError
from ..models import user_file
from ..recipe import TrainSettings


@dataclass(frozen=True)
class Batch:
    """Input of a loss.

    Attributes:
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        threat: norm and radius.
        generator: random number generator of this step.
        attack_model: the module to attack; under DDP the unwrapped one.
        teacher: the dense model in eval mode with frozen parameters; None without distillation.
    """

    x: Tensor
    y: Tensor
    threat: ThreatModel
    generator: torch.Generator
    attack_model: nn.Module
    teacher: nn.Module | None = None
    _made: list[Tensor] = field(default_factory=list)

    def adversarial(self, make: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return the adversarial images [N, C, H, W], generated once by ``make(attack_model)`` in frozen eval mode.

        Weight perturbation computes the loss twice on a batch; the second time the same images are used.
        """
        if not self._made:
            with frozen_eval(self.attack_model) as model:
                self._made.append(make(model).detach())
        return self._made[0]


@dataclass(frozen=True)
class LossResult:
    """Loss of a batch, and metrics to log.

    Attributes:
        loss: mean over the batch in nats, a scalar with its graph.
        metrics: detached scalar tensors by name; ``accuracy`` is the share in [0, 1] of correct predictions.
        logits: logits [N, K] of the adversarial images with their graph, for distillation; None if it is not possible.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


Loss = Callable[[nn.Module, Batch], LossResult]


def distilled(base: Loss, weight: float, temperature: float) -> Loss:
    """Return `base` combined with adversarial distillation (ARD; Goldblum et al., 2020, arXiv 1905.09747).

    The loss is ``(1 - weight) base + weight T^2 KL(teacher(x) || student(x_adv))`` with both distributions at
    temperature T. The adversarial images are those of `base`; the teacher gets the clean images. With weight 1 and
    T = 1 it is the robust term of RSLAD (Zi et al., 2021, arXiv 2108.07969). It costs one more forward pass of the
    teacher.

    Args:
        base: loss whose result has logits.
        weight: weight of the distillation in (0, 1].
        temperature: T > 0.

    Raises:
        UsageError: (when the loss is called) there is no teacher, or `base` returns no logits.
    """

    def loss(model: nn.Module, batch: Batch) -> LossResult:
        if batch.teacher is None:
            raise UsageError("distillation needs the dense parent, which only compress has. Set distillation to 0.")
        result = base(model, batch)
        if result.logits is None:
            raise UsageError("distillation needs the logits of the adversarial images: set LossResult.logits.")
        with torch.no_grad():
            reference = F.log_softmax(batch.teacher(batch.x).float() / temperature, dim=1)
        divergence = temperature**2 * divergence_from(result.logits / temperature, reference).mean()
        total = (1 - weight) * result.loss + weight * divergence
        return LossResult(total, {**result.metrics, "distillation": divergence.detach()}, result.logits)

    return loss


def pgd_images(
    attacked: nn.Module, batch: Batch, steps: int, objective: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the last PGD iterate [N, C, H, W] from a random start; the default objective is the cross-entropy."""
    return pgd(
        attacked,
        batch.x,
        batch.y,
        batch.threat,
        steps=steps,
        generator=batch.generator,
        objective=objective,
        keep_best=False,
    )


def clean_and_adversarial(model: nn.Module, batch: Batch, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """Return clean and adversarial logits [N, K] from one forward pass over both.

    With one pass batch-norm uses joint statistics of clean and adversarial images, as published.
    """
    clean_logits, logits = model(torch.cat([batch.x, x_adv])).float().chunk(2)
    return clean_logits, logits


def divergence_from(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(reference || softmax(logits)), [N], in nats; `reference` holds log-probabilities [N, K]."""
    return F.kl_div(F.log_softmax(logits, dim=1), reference, log_target=True, reduction="none").sum(1)


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> LossResult:
    """Return the mean cross-entropy of adversarial logits [N, K], in nats, with the accuracy as a metric."""
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return LossResult(loss, {"accuracy": accuracy_of(logits, y)}, logits)


def accuracy_of(logits: Tensor, y: Tensor) -> Tensor:
    """Return the accuracy in [0, 1] as a detached scalar."""
    return (logits.argmax(1) == y).float().mean().detach()


def make_loss(settings: TrainSettings) -> Loss:
    """Return the loss of the settings, with distillation if they ask for it.

    Raises:
        UsageError: the loss is unknown, or the user's file cannot be run.
    """
    name = settings.loss
    found = users_loss(name) if user_file.is_reference(name) else partial(LOSSES.load(name), settings=settings)
    return distilled(found, settings.distillation, settings.temperature) if settings.distillation else found


def users_loss(reference: str) -> Loss:
    """Return a loss written by the user, ``file.py:function``; its errors name file and line.

    Raises:
        UsageError: the file cannot be run or lacks the function; or (when the loss is called) the function fails or
            returns neither a `LossResult` nor a scalar tensor.
    """
    function = user_file.load_function(reference)

    def loss(model: nn.Module, batch: Batch) -> LossResult:
        with user_file.reported(reference):
            result = function(model, batch)
        if isinstance(result, Tensor) and result.ndim == 0:
            return LossResult(result)
        if not isinstance(result, LossResult):
            found = f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise UsageError(f"{reference} must return a LossResult or a scalar tensor, got {found}.")
        return result

    return loss
