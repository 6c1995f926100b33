"""The accelerator that a training run works through."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from .. import distributed
from ..errors import EnvironmentProblem, UsageError
from ..recipe import TrainSettings


def make_accelerator(settings: TrainSettings, device: str, folder: Path) -> Accelerator:
    """Accelerate's front for this process, with the settings' trackers writing into `folder`.

    Raises:
        EnvironmentProblem: a tracker was named whose package is not installed.
    """
    # accelerate drops trackers that are not installed without a word.
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
    """The largest batch up to `batch_size` that `count` processes share equally.

    Raises:
        UsageError: not even one image for each.
    """
    if batch_size < count:
        raise UsageError(f"a batch of {batch_size} images cannot be divided among {count} processes. Start fewer.")
    return batch_size - batch_size % count
