"""Batches of an epoch, read from disk by worker processes while the steps before them run."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.base import ImageSet, TensorImages
from ..data.crops import ResizedCrops
from ..errors import EnvironmentProblem, RobustPruneError, UsageError
from ..machine.host import usable_cores

AHEAD = 2
"""Batches that each worker has ready."""
MOST_WORKERS = 8
Read = tuple[Tensor, Tensor]
"""Images, uint8 [N, C, H, W], and labels, int64 [N]."""


@contextmanager
def reading(
    images: ImageSet, batches: Sequence[Tensor], device: torch.device, workers: int
) -> Iterator[Iterator[Read]]:
    """Yield an iterator over the images and labels of batches, on a device; workers end with the block.

    Args:
        images: the image set; images in memory are taken without workers.
        batches: positions of the images of each batch, int64 [N].
        device: device of the results.
        workers: processes that decode images ahead; 0 decodes each batch when it is asked for.

    Raises:
        UsageError: an image cannot be decoded.
        EnvironmentProblem: a worker ended, for instance because memory was short; torch notices that wherever the block
            is.
    """
    held = images.base if isinstance(images, ResizedCrops) else images
    if isinstance(held, TensorImages) or workers == 0 or not batches:
        place = held.images.device if isinstance(held, TensorImages) else torch.device("cpu")
        yield _one_by_one(images, batches, place, device)
        return
    # The recipe asks for this number, or it is at most half of the cores.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    loader: DataLoader[Any] = DataLoader(
        _Batches(images), batch_size=None, sampler=_Listed(batches), num_workers=workers, prefetch_factor=AHEAD,
        pin_memory=device.type == "cuda", worker_init_fn=_leave_signals_to_the_parent,
    )  # fmt: skip
    iterator: Any = None
    try:
        with _signals_later():
            iterator = iter(loader)
        yield _loaded(iterator, device)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise EnvironmentProblem(
            f"a process that reads images ended ({said}). Memory, or shared memory (/dev/shm), may be short: set "
            "training.workers and finetune.workers to a smaller number, or to 0."
        ) from error
    finally:
        # Left to the garbage collector, which discards exceptions, an interruption in this moment would be lost.
        if iterator is not None:
            with _signals_later():
                iterator._shutdown_workers()


def _one_by_one(
    images: ImageSet, batches: Sequence[Tensor], place: torch.device, device: torch.device
) -> Iterator[Read]:
    for indices in batches:
        x, y = images.get(indices.to(place))
        yield x.to(device), y.to(device)


def _loaded(batches: Iterator[Any], device: torch.device) -> Iterator[Read]:
    for x, y in batches:
        if isinstance(x, str):
            raise UsageError(x)
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Put off signals that end the program until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for arrival in arrived:
            signal.raise_signal(arrival)


def _leave_signals_to_the_parent(_: int) -> None:
    """Let Ctrl-C, which all processes of a terminal get, reach the parent alone, and SIGTERM end a worker silently."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def default_workers(processes: int) -> int:
    """Return the number of workers of each of the processes of a run: half of the cores, at most `MOST_WORKERS`."""
    return max(1, min(MOST_WORKERS, usable_cores() // (2 * processes)))


class _Batches(Dataset[Any]):
    """Whole batches as the items of a dataset; an error is returned as a text, since torch would wrap its message."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, indices: Tensor) -> Any:
        try:
            return self.images.get(indices)
        except RobustPruneError as error:
            return str(error), ""


@dataclass(frozen=True)
class _Listed:
    batches: Sequence[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
