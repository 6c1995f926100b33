"""Recorded outputs of the layers before a weight, over the batches of a set and within a memory limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .losses import RobustLoss
from .replay import Recording, Trace, record, replay

FEW = 2
"""Number of images on which the size of recordings is measured."""


class Recordings:
    """Outputs that do not depend on some weights, recorded once for each batch and kept across passes.

    Args:
        loss: loss whose batches are recorded.
        trace: trace of the same model.
        weights: weights that may change, one at a time.
        limit: largest number of bytes to keep; batches beyond it have empty recordings and are computed in full.

    Attributes:
        loss: the same loss.
    """

    def __init__(self, loss: RobustLoss, trace: Trace, weights: Iterable[nn.Parameter], limit: int) -> None:
        self.loss, self._trace, self._limit = loss, trace, limit
        self._reuse = {id(weight): trace.frontier(weight) for weight in weights}
        self._keep = frozenset[int]().union(*self._reuse.values())
        self._held: dict[int, Recording] = {}
        self._bytes = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Recording]]:
        """Yield images [B, C, H, W], labels [B] and the recording of each batch."""
        for position, (x, y) in enumerate(self.loss.batches()):
            if position not in self._held:
                self._held[position] = self._record(x)
            yield x, y, self._held[position]

    def _record(self, x: Tensor) -> Recording:
        if not self._keep or self._bytes >= self._limit:
            return Recording()
        with self.loss.autocast():
            made = record(self.loss.model, self._trace, x, self._keep)[1]
        self._bytes += made.nbytes()
        if self._bytes <= self._limit:
            return made
        self._bytes = self._limit
        return Recording()

    def replay(self, weight: nn.Parameter, x: Tensor, recording: Recording) -> Tensor:
        """Return the logits [B, K] of a batch, with the outputs of layers before `weight` taken from the recording."""
        return replay(self.loss.model, self._trace, x, recording, self._reuse[id(weight)])


def bytes_an_image(loss: RobustLoss, trace: Trace, weights: Iterable[nn.Parameter]) -> int:
    """Return the size of recordings for `weights`, in bytes for each image."""
    few = next(loss.part(FEW).batches())[0]
    keep = frozenset[int]().union(*(trace.frontier(weight) for weight in weights))
    with loss.autocast():
        return record(loss.model, trace, few, keep)[1].nbytes() // len(few)


def bounded(loss: RobustLoss, trace: Trace, weights: Iterable[nn.Parameter], limit: int) -> RobustLoss:
    """Return the loss with batches small enough that recordings and saved activations take at most `limit` bytes each.

    A batch has at least one image.
    """
    weights = list(weights)
    one, two = (_saved_bytes(loss, next(loss.part(count).batches())[0], weights) for count in (1, 2))
    an_image = max(1, two - one, bytes_an_image(loss, trace, weights))
    return replace(loss, batch_size=max(1, min(loss.batch_size, limit // an_image)))


def _saved_bytes(loss: RobustLoss, x: Tensor, weights: Sequence[nn.Parameter]) -> int:
    """Return the bytes that autograd saves in one forward pass, converted weights included."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    wanted = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), loss.autocast(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            logits = loss.model(x)  # kept alive, so that no two storages share an address
    finally:
        for weight, flag in zip(weights, wanted, strict=True):
            weight.requires_grad_(flag)
    del logits
    return sum(saved.values())
