"""Losses and accuracies of training steps, read back from the device now and then instead of after every step."""

from __future__ import annotations

import time

import torch
from torch import Tensor

READ_BACK_SECONDS = 1.0


class StepFigures:
    """What steps left on the device since the last `read`.

    Reading a number back makes the host wait until the device has done everything before it; a step that reads its own
    loss therefore leaves a GPU idle while the next one is prepared.
    """

    def __init__(self) -> None:
        self._queued: list[Tensor] = []
        self._last = time.monotonic()

    def queue(self, loss: Tensor, accuracy: Tensor | float | None) -> None:
        """Notes the scalar loss of one step and its training accuracy, in [0, 1] if it has one."""
        loss = loss.detach().double()
        if not isinstance(accuracy, Tensor):
            accuracy = torch.full_like(loss, float("nan") if accuracy is None else accuracy)
        self._queued.append(torch.stack([loss, accuracy.detach().to(loss)]))

    @property
    def due(self) -> bool:
        """Whether the last reading is `READ_BACK_SECONDS` ago."""
        return time.monotonic() - self._last >= READ_BACK_SECONDS

    def read(self) -> list[tuple[float, float]]:
        """Loss and accuracy of every step since the last reading, in order; the device is waited for."""
        read = torch.stack(self._queued).tolist() if self._queued else []
        self._queued.clear()
        self._last = time.monotonic()
        return [(loss, accuracy) for loss, accuracy in read]
