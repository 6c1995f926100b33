"""The Hugging Face accelerator of a training run."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from .. import distributed
from ..errors import EnvironmentProblem, UsageError
from ..recipe import TrainSettings


def make_accelerator(settings: TrainSettings, device: str, folder: Path) -> Accelerator:
    """Return an `Accelerator` for this process, with the trackers of the settings writing to `folder`.

    Raises:
        EnvironmentProblem: the package of a tracker is not installed.
    """
    # accelerate ignores trackers that are not installed without a warning.
    missing = sorted(set(settings.trackers) - {str(tracker) for tracker in get_available_trackers()})
    if missing:
        hint = "pip install 'robust-prune[tensorboard]'" if missing == ["tensorboard"] else f"pip install {missing[0]}"
        raise EnvironmentProblem(f"tracker {missing[0]} was asked for, but its package is not installed. Run: {hint}")
    distributed.join(device)
    accelerator = Accelerator(cpu=device == "cpu", log_with=list(settings.trackers) or None, project_dir=folder)
    if settings.trackers:
        accelerator.init_trackers("trackers")
    return accelerator


def divisible(batch_size: int, count: int) -> int:
    """Return the largest batch size up to `batch_size` that is divisible by `count` processes.

    Raises:
        UsageError: there is less than one image for each process.
    """
    if batch_size < count:
        raise UsageError(f"a batch of {batch_size} images cannot be divided among {count} processes. Start fewer.")
    return batch_size - batch_size % count
