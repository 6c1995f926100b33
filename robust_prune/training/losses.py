"""What adversarial training losses share; each is a file of `training/loss_functions`: see `catalogue.LOSSES`.

A user's own loss is a ``file.py:function``, called as ``function(model, batch)``, which returns a
`LossResult` or a scalar tensor.
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
    """What a loss sees.

    Attributes:
        x: images in [0, 1], [N, C, H, W].
        y: labels, [N].
        threat: norm and radius.
        generator: source of all randomness of this step.
        attack_model: the module to attack; the unwrapped one under DDP.
        teacher: the dense parent in eval mode with frozen parameters, where there is one.
    """

    x: Tensor
    y: Tensor
    threat: ThreatModel
    generator: torch.Generator
    attack_model: nn.Module
    teacher: nn.Module | None = None
    _made: list[Tensor] = field(default_factory=list)

    def adversarial(self, make: Callable[[nn.Module], Tensor]) -> Tensor:
        """The batch's adversarial images, made once by ``make(attack_model)`` in frozen eval mode.

        A loss that is taken twice on one batch, as weight perturbation does, attacks once.
        """
        if not self._made:
            with frozen_eval(self.attack_model) as model:
                self._made.append(make(model).detach())
        return self._made[0]


@dataclass(frozen=True)
class LossResult:
    """A scalar loss in nats to call backward on, and figures to log (floats as detached scalar tensors).

    Attributes:
        loss: mean over the batch.
        metrics: ``accuracy`` on the images that the loss was taken on, and whatever else.
        logits: of the adversarial images, [N, K] with their graph; None for a loss that cannot be distilled into.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


Loss = Callable[[nn.Module, Batch], LossResult]


def distilled(base: Loss, weight: float, temperature: float) -> Loss:
    """Mixes any loss with adversarial distillation from the teacher (ARD, Goldblum et al., 2020, arXiv 1905.09747).

    ``(1 - weight) base + weight T^2 KL(teacher(x) || student(x_adv))``, both distributions at temperature T; the
    examples are those of `base`, the teacher sees the images as they are. With weight 1 and T = 1 it is the robust part
    of RSLAD (Zi et al., 2021, arXiv 2108.07969). One forward of the teacher more.

    Args:
        base: whose result must hold logits.
        weight: in (0, 1].
        temperature: > 0.

    Raises:
        UsageError: (when called) there is no teacher, or `base` gives no logits.
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
    """The batch's images after PGD, from a random start; the cross-entropy is ascended unless `objective` is given."""
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
    """Clean and adversarial logits from one pass over both halves.

    One pass keeps batch-norm statistics of clean and adversarial images together, as published.
    """
    clean_logits, logits = model(torch.cat([batch.x, x_adv])).float().chunk(2)
    return clean_logits, logits


def divergence_from(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || softmax(logits)) per sample, from log-probabilities so that it cannot become NaN."""
    return F.kl_div(F.log_softmax(logits, dim=1), reference, log_target=True, reduction="none").sum(1)


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> LossResult:
    """Cross-entropy of adversarial logits."""
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return LossResult(loss, {"accuracy": accuracy_of(logits, y)}, logits)


def accuracy_of(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right classes in [0, 1], a detached scalar."""
    return (logits.argmax(1) == y).float().mean().detach()


def make_loss(settings: TrainSettings) -> Loss:
    """The loss of a recipe, with its settings bound.

    Raises:
        UsageError: no such loss, or a user's file that cannot be run.
    """
    name = settings.loss
    found = users_loss(name) if user_file.is_reference(name) else partial(LOSSES.load(name), settings=settings)
    return distilled(found, settings.distillation, settings.temperature) if settings.distillation else found


def users_loss(reference: str) -> Loss:
    """A loss that a user wrote, ``file.py:function``; errors in it name file and line.

    Raises:
        UsageError: the file cannot be run or lacks the function; (when called) it fails, or returns neither a
            `LossResult` nor a scalar tensor.
    """
    function = user_file.load_function(reference)

    def loss(model: nn.Module, batch: Batch) -> LossResult:
        try:
            result = function(model, batch)
        except UsageError:
            raise
        except Exception as error:  # anything may go wrong in a stranger's code; all of it is theirs to mend
            where = user_file.blame(error, reference)
            raise UsageError(f"{reference} failed: {where}{type(error).__name__}: {error}") from error
        if isinstance(result, Tensor) and result.ndim == 0:
            return LossResult(result)
        if not isinstance(result, LossResult):
            found = f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise UsageError(f"{reference} must return a LossResult or a scalar tensor, got {found}.")
        return result

    return loss
