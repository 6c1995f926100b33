"""Outcome of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from ..shown import Shown


@dataclass(frozen=True)
class EpochRecord:
    """Figures of one epoch; accuracies in [0, 1] on held-out training images.

    `train_accuracy` is None for a loss that does not report it. `source` names the weights that scored better: ``live``
    or ``average``.
    """

    epoch: int
    train_loss: float
    train_accuracy: float | None
    val_clean: float
    val_robust: float
    source: str
    lr: float
    seconds: float


@dataclass(frozen=True, repr=False)
class TrainResult(Shown):
    """What a run reached; the chosen weights are loaded into the model that was passed in.

    Attributes:
        history: one record an epoch.
        best_epoch: epoch (from 1) whose weights were chosen, by held-out robust accuracy; 0 when no epoch was better
            than the start.
        note: empty, or why training was cut short or taught nothing.
    """

    history: tuple[EpochRecord, ...]
    best_epoch: int
    note: str = ""

    def short(self) -> str:
        """Epochs, and what the chosen one reached on held-out images."""
        best = self.history[self.best_epoch - 1] if self.best_epoch else None
        reached = (
            f", best {best.epoch}: held-out {best.val_clean:.1%} clean, {best.val_robust:.1%} robust" if best else ""
        )
        note = f"; {self.note}" if self.note else ""
        return f"{len(self.history)} epoch{'' if len(self.history) == 1 else 's'}{reached}{note}"
