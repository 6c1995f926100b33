"""One command in several processes, as torchrun and accelerate start them: who writes, and how results reach all.

Every process runs the same program. Work that all of them share (training, attacks) is divided; the rest is done by
the first process while the others wait for its outcome. Only the first one writes files and talks to the terminal.
"""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

# Waiting is normal: the first process may measure or export for hours before the others are needed again.
PATIENCE = timedelta(days=30)


def launched() -> int:
    """Number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> None:
    """Meets the other processes, if a launcher started any; a second call does nothing.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``. On GPUs each process takes its own.
    """
    if launched() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)


def count() -> int:
    """Processes that have met."""
    group = _group()
    return group.get_world_size() if group else 1


def index() -> int:
    """This process among them, from 0."""
    group = _group()
    return group.get_rank() if group else 0


def is_first() -> bool:
    """Whether this is the process that writes; known from the launcher before the processes have met."""
    return int(os.environ.get("RANK", "0")) == 0 or launched() == 1


def broadcast(value: Value) -> Value:
    """The first process's `value`, in all of them; it must be picklable."""
    group = _group()
    if not group:
        return value
    held = [value]
    group.broadcast_object_list(held, src=0)
    return held[0]


def all_gather(value: Value) -> list[Value]:
    """Every process's `value`, in order, in all of them."""
    group = _group()
    if not group:
        return [value]
    held: list[Value] = [value] * count()
    group.all_gather_object(held, value)
    return held


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Replaces floating-point tensors of one device by their mean over the processes, in place."""
    group = _group()
    if not group or not tensors:
        return
    import torch

    flat = torch.cat([tensor.float().flatten() for tensor in tensors])
    group.all_reduce(flat)
    parts = (flat / count()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def one_at_a_time_per_node() -> Iterator[None]:
    """Lets the first process of each machine go before the others, so that a download is made once."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def leave_group() -> bool:
    """Ends the sharing: from here on the processes no longer wait for each other.

    Returns:
        Whether this is the first process, which goes on alone.
    """
    group = _group()
    if group:
        # What still refers to the group, or a peer that is not done, would abort the process when it ends.
        gc.collect()
        group.barrier()
        group.destroy_process_group()
    return is_first()


def launch_command() -> str:
    """The words that start a command in as many processes on one machine, or nothing."""
    if launched() == 1:
        return ""
    return shlex.join(["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(launched()))])


def _group() -> Any:
    """`torch.distributed` once the processes have met, else None. Without a launcher torch is not imported."""
    if launched() == 1:
        return None
    import torch.distributed as group

    return group if group.is_available() and group.is_initialized() else None
