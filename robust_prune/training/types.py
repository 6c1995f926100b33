"""Outcome of a training run."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class TrainResult:
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
