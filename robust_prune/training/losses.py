"""Adversarial training losses: pure functions of a model and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import ThreatModel, frozen_eval, n_fgsm, pgd
from ..errors import UsageError


@dataclass(frozen=True)
class Batch:
    """What a loss sees.

    Attributes:
        x: images in [0, 1], [N, C, H, W].
        y: labels, [N].
        threat: norm and radius.
        generator: source of all randomness of this step.
        attack_model: the module to attack; the unwrapped one under DDP.
    """

    x: Tensor
    y: Tensor
    threat: ThreatModel
    generator: torch.Generator
    attack_model: nn.Module


@dataclass(frozen=True)
class LossResult:
    """A scalar loss in nats to call backward on, and figures to log (floats as detached scalar tensors)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[nn.Module, Batch], LossResult]


def clean(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> LossResult:
    """Cross-entropy on the images as they are. One forward and backward."""
    logits = model(batch.x).float()
    return _cross_entropy(logits, batch.y, label_smoothing)


def n_fgsm_at(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> LossResult:
    """Cross-entropy on N-FGSM examples (arXiv 2202.01181). Two forwards and backwards."""
    with frozen_eval(batch.attack_model):
        x_adv = n_fgsm(batch.attack_model, batch.x, batch.y, batch.threat, generator=batch.generator)
    return _cross_entropy(model(x_adv).float(), batch.y, label_smoothing)


def pgd_at(model: nn.Module, batch: Batch, *, steps: int = 10, label_smoothing: float = 0.0) -> LossResult:
    """Cross-entropy on PGD examples (Madry et al., arXiv 1706.06083). `steps` + 1 forwards and backwards."""
    with frozen_eval(batch.attack_model):
        x_adv = pgd(
            batch.attack_model,
            batch.x,
            batch.y,
            batch.threat,
            steps=steps,
            generator=batch.generator,
            keep_best=False,
        )
    return _cross_entropy(model(x_adv).float(), batch.y, label_smoothing)


def trades(
    model: nn.Module, batch: Batch, *, steps: int = 10, beta: float = 6.0, label_smoothing: float = 0.0
) -> LossResult:
    """TRADES: clean cross-entropy plus `beta` times KL(clean || adversarial) (Zhang et al., arXiv 1901.08573).

    The clean distribution that the attack moves away from is computed once. `steps` + 3 forwards and `steps` + 2
    backwards.
    """
    with frozen_eval(batch.attack_model):
        with torch.no_grad():
            reference = F.log_softmax(batch.attack_model(batch.x).float(), dim=1)
        x_adv = pgd(
            batch.attack_model,
            batch.x,
            batch.y,
            batch.threat,
            steps=steps,
            generator=batch.generator,
            objective=lambda logits: _kl(logits, reference),
            keep_best=False,
        )
    # One pass over both halves keeps batch-norm statistics of clean and adversarial images together, as published.
    clean_logits, adversarial_logits = model(torch.cat([batch.x, x_adv])).float().chunk(2)
    supervised = _cross_entropy(clean_logits, batch.y, label_smoothing)
    divergence = _kl(adversarial_logits, F.log_softmax(clean_logits, dim=1)).mean()
    robust = (adversarial_logits.argmax(1) == batch.y).float().mean().detach()
    return LossResult(supervised.loss + beta * divergence, {"accuracy": robust, "divergence": divergence.detach()})


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || softmax(logits)) per sample, from log-probabilities so that it cannot become NaN."""
    return F.kl_div(F.log_softmax(logits, dim=1), reference, log_target=True, reduction="none").sum(1)


def _cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> LossResult:
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return LossResult(loss, {"accuracy": (logits.argmax(1) == y).float().mean().detach()})


LOSSES = ("n_fgsm", "pgd_at", "trades", "clean")


def make_loss(name: str, *, steps: int, beta: float, label_smoothing: float) -> Loss:
    """The loss called `name`, with its settings bound.

    Raises:
        UsageError: no such loss.
    """
    if name == "n_fgsm":
        return partial(n_fgsm_at, label_smoothing=label_smoothing)
    if name == "pgd_at":
        return partial(pgd_at, steps=steps, label_smoothing=label_smoothing)
    if name == "trades":
        return partial(trades, steps=steps, beta=beta, label_smoothing=label_smoothing)
    if name == "clean":
        return partial(clean, label_smoothing=label_smoothing)
    raise UsageError(f"unknown loss {name!r}. Choose one of {', '.join(LOSSES)}.")
