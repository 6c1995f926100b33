"""Results of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from ..shown import Shown


@dataclass(frozen=True)
class EpochRecord:
    """Results of one epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        train_loss: mean training loss in nats.
        train_accuracy: mean accuracy in [0, 1] on training batches; None if the loss does not report it.
        val_clean, val_robust: accuracy in [0, 1] on held-out training images, clean and under PGD; None without any.
        source: weights with the better score: ``live`` or ``average``.
        lr: learning rate at the end of the epoch.
        seconds: wall time of the training steps, without validation.
        waited: seconds of these in which no step ran, since images were being read.
    """

    epoch: int
    train_loss: float
    train_accuracy: float | None
    val_clean: float | None
    val_robust: float | None
    source: str
    lr: float
    seconds: float
    waited: float = 0.0


@dataclass(frozen=True)
class Start:
    """Accuracy before the first epoch, on the images and under the attack that judge the epochs as well.

    Attributes:
        clean, robust: accuracy in [0, 1] on held-out training images, clean and under PGD from one random start.
        images: number of these images.
        steps: steps of PGD.
    """

    clean: float
    robust: float
    images: int
    steps: int


@dataclass(frozen=True, repr=False)
class TrainResult(Shown):
    """Result of a training run, whose best weights are loaded into the trained model.

    Attributes:
        history: one record for each epoch.
        best_epoch: epoch (from 1) with the best held-out robust accuracy, whose weights were selected; 0 if no epoch
            was better than the start.
        note: why training ended early or did not learn; empty otherwise.
        start: accuracy before the first epoch; None without held-out images.
    """

    history: tuple[EpochRecord, ...]
    best_epoch: int
    note: str = ""
    start: Start | None = None

    def short(self) -> str:
        """Return one sentence: the number of epochs, and the held-out accuracies of the selected one."""
        best = self.history[self.best_epoch - 1] if self.best_epoch else None
        reached = f", epoch {best.epoch} was selected" if best else ", none was better than the start"
        if best is not None and best.val_clean is not None and best.val_robust is not None:
            reached += f": held-out {best.val_clean:.1%} clean, {best.val_robust:.1%} robust"
        note = f"; {self.note}" if self.note else ""
        return f"{len(self.history)} epoch{'' if len(self.history) == 1 else 's'}{reached}{note}"
