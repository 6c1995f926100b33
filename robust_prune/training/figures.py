"""Losses and accuracies of training steps, read from the device about once a second instead of after every step."""

from __future__ import annotations

import time

import torch
from torch import Tensor

READ_BACK_SECONDS = 1.0


class StepFigures:
    """Losses and accuracies of the steps since the last `read`, on the device.

    Reading a value synchronises the host with the device. If every step read its own loss, the GPU would be idle while
    the next step is prepared.
    """

    def __init__(self) -> None:
        self._queued: list[Tensor] = []
        self._last = time.monotonic()

    def queue(self, loss: Tensor, accuracy: Tensor | float | None) -> None:
        """Record the scalar loss of a step, in nats, and its training accuracy in [0, 1], or None without one."""
        loss = loss.detach().double()
        if not isinstance(accuracy, Tensor):
            accuracy = torch.full_like(loss, float("nan") if accuracy is None else accuracy)
        self._queued.append(torch.stack([loss, accuracy.detach().to(loss)]))

    @property
    def due(self) -> bool:
        """Whether at least `READ_BACK_SECONDS` have passed since the last `read`."""
        return time.monotonic() - self._last >= READ_BACK_SECONDS

    def read(self) -> list[tuple[float, float]]:
        """Return the loss and accuracy (NaN if None) of every step since the last `read`; synchronises the device."""
        read = torch.stack(self._queued).tolist() if self._queued else []
        self._queued.clear()
        self._last = time.monotonic()
        return [(loss, accuracy) for loss, accuracy in read]
