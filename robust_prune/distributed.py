"""Distributed runs, started by torchrun or accelerate: one command in several processes.

Every process runs the same program. Training and attacks are divided among all processes; other work is done by the
first process, while the others wait for its result. Only the first process writes files and prints to the terminal.
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

# The first process may measure or export for hours while the others wait.
PATIENCE = timedelta(days=30)


def launched() -> int:
    """Return the number of processes started by a launcher; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> None:
    """Initialise the process group if a launcher started several processes; further calls do nothing.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``; each process uses its own GPU.
    """
    if launched() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)


def count() -> int:
    """Return the number of processes in the process group; 1 without one."""
    group = _group()
    return group.get_world_size() if group else 1


def index() -> int:
    """Return the rank of this process in the process group, from 0."""
    group = _group()
    return group.get_rank() if group else 0


def is_first() -> bool:
    """Return whether this is the first process, which writes files; it works before the process group exists."""
    return int(os.environ.get("RANK", "0")) == 0 or launched() == 1


def broadcast(value: Value) -> Value:
    """Return the first process's `value` in all processes; it must be picklable."""
    group = _group()
    if not group:
        return value
    held = [value]
    group.broadcast_object_list(held, src=0)
    return held[0]


def all_gather(value: Value) -> list[Value]:
    """Return the `value` of every process, in order of rank, in all processes."""
    group = _group()
    if not group:
        return [value]
    held: list[Value] = [value] * count()
    group.all_gather_object(held, value)
    return held


def all_reduce_mean(tensors: list[Tensor]) -> None:
    """Replace floating-point tensors on one device by their mean over all processes, in place."""
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
    """Run the block in the first process of each machine before the others, so that downloads happen only once."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def leave_group() -> bool:
    """Destroy the process group; afterwards the processes do not wait for each other.

    Returns:
        Whether this is the first process, which continues alone.
    """
    group = _group()
    if group:
        # Remaining references to the group, or unfinished peers, would abort the process at its end.
        gc.collect()
        group.barrier()
        group.destroy_process_group()
    return is_first()


def launch_command() -> str:
    """Return the launcher and its arguments for as many processes on one machine; empty for one process."""
    if launched() == 1:
        return ""
    return shlex.join(["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(launched()))])


def _group() -> Any:
    """Return `torch.distributed` if the process group exists, else None; without a launcher torch is not imported."""
    if launched() == 1:
        return None
    import torch.distributed as group

    return group if group.is_available() and group.is_initialized() else None
