"""Adversarial training losses: pure functions of a model and a batch.

A user's own loss has the same form: ``file.py:function``, called as ``function(model, batch)``, which returns a
`LossResult` or a scalar tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import ThreatModel, frozen_eval, n_fgsm, pgd
from ..errors import UsageError
from ..models import user_file
from ..recipe import LOSSES, TrainSettings


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


def clean(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> LossResult:
    """Cross-entropy on the images as they are. One forward and backward."""
    return _cross_entropy(model(batch.x).float(), batch.y, label_smoothing)


def n_fgsm_at(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> LossResult:
    """Cross-entropy on N-FGSM examples (arXiv 2202.01181). Two forwards and backwards."""
    x_adv = batch.adversarial(lambda m: n_fgsm(m, batch.x, batch.y, batch.threat, generator=batch.generator))
    return _cross_entropy(model(x_adv).float(), batch.y, label_smoothing)


def pgd_at(model: nn.Module, batch: Batch, *, steps: int = 10, label_smoothing: float = 0.0) -> LossResult:
    """Cross-entropy on PGD examples (Madry et al., arXiv 1706.06083). `steps` + 1 forwards and backwards."""
    x_adv = batch.adversarial(partial(_pgd, batch=batch, steps=steps))
    return _cross_entropy(model(x_adv).float(), batch.y, label_smoothing)


def trades(
    model: nn.Module, batch: Batch, *, steps: int = 10, beta: float = 6.0, label_smoothing: float = 0.0
) -> LossResult:
    """TRADES: clean cross-entropy plus `beta` times KL(clean || adversarial) (Zhang et al., arXiv 1901.08573).

    The clean distribution that the attack moves away from is computed once. `steps` + 3 forwards and `steps` + 2
    backwards.
    """

    def attack(attacked: nn.Module) -> Tensor:
        with torch.no_grad():
            reference = F.log_softmax(attacked(batch.x).float(), dim=1)
        return _pgd(attacked, batch, steps, lambda logits: _kl(logits, reference))

    clean_logits, logits = _both(model, batch, batch.adversarial(attack))
    supervised = F.cross_entropy(clean_logits, batch.y, label_smoothing=label_smoothing)
    divergence = _kl(logits, F.log_softmax(clean_logits, dim=1)).mean()
    metrics = {"accuracy": _accuracy(logits, batch.y), "divergence": divergence.detach()}
    return LossResult(supervised + beta * divergence, metrics, logits)


def mart(
    model: nn.Module, batch: Batch, *, steps: int = 10, beta: float = 6.0, label_smoothing: float = 0.0
) -> LossResult:
    """MART: adversarial training that weighs misclassified images more (Wang et al., ICLR 2020, OpenReview rklOg6EFwS).

    Boosted cross-entropy on PGD examples, plus `beta` times KL(clean || adversarial) weighted by one minus the clean
    probability of the label. `steps` + 2 forwards and backwards.
    """
    clean_logits, logits = _both(model, batch, batch.adversarial(partial(_pgd, batch=batch, steps=steps)))
    own = batch.y[:, None]
    rival = F.softmax(logits, dim=1).scatter(1, own, 0.0).amax(1)
    # log(1 - rival) from 1 - rival itself would be -inf once the rival's probability rounds to one.
    boosted = (
        F.cross_entropy(logits, batch.y, label_smoothing=label_smoothing)
        - torch.log1p(-rival.clamp_max(1 - 1e-6)).mean()
    )
    doubt = 1 - F.softmax(clean_logits, dim=1).gather(1, own).squeeze(1)
    divergence = (_kl(logits, F.log_softmax(clean_logits, dim=1)) * doubt).mean()
    metrics = {"accuracy": _accuracy(logits, batch.y), "divergence": divergence.detach()}
    return LossResult(boosted + beta * divergence, metrics, logits)


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
        divergence = temperature**2 * _kl(result.logits / temperature, reference).mean()
        total = (1 - weight) * result.loss + weight * divergence
        return LossResult(total, {**result.metrics, "distillation": divergence.detach()}, result.logits)

    return loss


def _pgd(attacked: nn.Module, batch: Batch, steps: int, objective: Callable[[Tensor], Tensor] | None = None) -> Tensor:
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


def _both(model: nn.Module, batch: Batch, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and adversarial logits from one pass over both halves.

    One pass keeps batch-norm statistics of clean and adversarial images together, as published.
    """
    clean_logits, logits = model(torch.cat([batch.x, x_adv])).float().chunk(2)
    return clean_logits, logits


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || softmax(logits)) per sample, from log-probabilities so that it cannot become NaN."""
    return F.kl_div(F.log_softmax(logits, dim=1), reference, log_target=True, reduction="none").sum(1)


def _cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> LossResult:
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return LossResult(loss, {"accuracy": _accuracy(logits, y)}, logits)


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).float().mean().detach()


def make_loss(settings: TrainSettings) -> Loss:
    """The loss of a recipe, with its settings bound.

    Raises:
        UsageError: no such loss, or a user's file that cannot be run.
    """
    name, smoothing = settings.loss, settings.label_smoothing
    if user_file.is_reference(name):
        found = users_loss(name)
    elif name == "n_fgsm":
        found = partial(n_fgsm_at, label_smoothing=smoothing)
    elif name == "pgd_at":
        found = partial(pgd_at, steps=settings.steps, label_smoothing=smoothing)
    elif name in ("trades", "mart"):
        bound = trades if name == "trades" else mart
        found = partial(bound, steps=settings.steps, beta=settings.beta, label_smoothing=smoothing)
    elif name == "clean":
        found = partial(clean, label_smoothing=smoothing)
    else:
        raise UsageError(f"unknown loss {name!r}. Choose one of {', '.join(LOSSES)}, or file.py:function.")
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
