"""Interleaved timing of several models: one process for each model, timed in random order in every block.

Its memory layout makes a process faster or slower throughout its lifetime, so processes are launched several times.
Launches are a level of repetition above blocks, as blocks are above runs (Kalibera and Jones, Rigorous Benchmarking in
Reasonable Time, ISMM 2013).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from ..machine import nvml
from ..machine.child import Child

ANSWER_SECONDS = 300.0
WARMUP_WINDOW_SECONDS = 0.1
WARMUP_WINDOWS = (3, 20)
WARMUP_TOLERANCE = 0.05
VISIT_SECONDS = 0.04
MAX_RUNS = 64
# Untimed runs before each visit, since another process has just filled the caches with its own weights.
WAKE_RUNS = 1
BLOCKS = (12, 400)
LAUNCHES = 5
ENERGY_SECONDS = 3.0
PATIENCE = 2.0


@dataclass(frozen=True)
class Arm:
    """A model to time: its label for messages and its ONNX file."""

    label: str
    path: Path


@dataclass(frozen=True)
class Shape:
    """Fixed conditions of a measurement: batch size, intra-op threads, execution provider and kind of row."""

    batch: int
    threads: int
    provider: str
    kind: str

    @property
    def on_gpu(self) -> bool:
        """Whether the provider runs on a GPU."""
        return self.provider != "cpu"


@dataclass(frozen=True)
class Samples:
    """Times of one arm.

    Attributes:
        provider: execution provider reported by the session.
        seconds: seconds of each run, float64 [launches, blocks, runs]; entries [l, b] of all arms are from one block.
        memory_mib: resident memory of the process after its runs in MiB, the maximum over launches.
        gpu_memory_mib: GPU memory of the process in MiB; None on a CPU or if NVML does not report it.
        joules: energy of all GPUs for one run in joules, idle power included; None if it was not measured.
    """

    provider: str
    seconds: np.ndarray
    memory_mib: float
    gpu_memory_mib: float | None = None
    joules: float | None = None


class Worker:
    """A worker process with one session, as a context manager that always ends the process.

    Args:
        label: name of the model, for messages.
        provider: execution provider whose libraries are loaded at the start.
    """

    def __init__(self, label: str, provider: str = "cpu") -> None:
        self.label, self.provider = label, provider

    def __enter__(self) -> Worker:
        self._child = Child(f"the process that timed {self.label}", "robust_prune.bench.worker", self.provider)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._child.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one command and return its answer; see `Child.ask` for errors."""
        return self._child.ask(request, seconds=ANSWER_SECONDS)[0]


@dataclass(frozen=True)
class _Schedule:
    """Number of launches, of blocks in a launch (`least` on a busy machine), and of runs in a block."""

    launches: int
    blocks: int
    least: int
    runs: int


def measure(
    arms: Sequence[Arm],
    shape: Shape,
    seconds: float,
    seed: int,
    on_block: Callable[[int, int], None] = lambda done, total: None,
    energy: bool = False,
) -> list[Samples]:
    """Time the arms in interleaved random blocks, after a warm-up until their times are stable.

    Args:
        arms: the models, each of which runs in its own process.
        shape: batch size, threads, provider and kind, the same for all arms.
        seconds: target for the seconds of timed runs. Blocks end after twice this wall time, but at least 12 are taken.
            Processes are launched up to five times, as far as opening the models takes no longer than this in total.
        seed: random seed of the order and of the input images.
        on_block: called with (completed blocks, total blocks) after each block.
        energy: whether each model then runs alone for about three seconds, to read NVML's energy counter.

    Returns:
        The samples of each arm, in the order of `arms`, all of the same shape.

    Raises:
        UsageError, EnvironmentProblem: as `Worker.ask`. All processes are ended.
    """
    request = {"batch": shape.batch, "threads": shape.threads, "provider": shape.provider, "kind": shape.kind}
    rng = np.random.default_rng(seed)
    schedule: _Schedule | None = None
    launches: list[np.ndarray] = []
    memory: list[list[tuple[float, float | None]]] = []
    spent: list[float | None] = [None] * len(arms)
    providers = [""] * len(arms)
    while schedule is None or len(launches) < schedule.launches:
        begin = monotonic()
        # The process opened first remains slightly slower, so the order differs between launches.
        order = rng.permutation(len(arms))
        with _workers([arms[index].label for index in order], shape.provider) as opened:
            for worker, index in zip(opened, order, strict=True):
                answer = worker.ask(op="open", path=str(arms[index].path.absolute()), seed=seed, **request)
                providers[index] = answer["provider"]
            warmed = [(worker, _warm_up(worker)) for worker in opened]
            workers, typical = zip(*(warmed[place] for place in np.argsort(order)), strict=True)
            now = monotonic()
            schedule = schedule or _schedule(typical, seconds, now - begin)
            deadline = now + PATIENCE * seconds / schedule.launches
            launches.append(_blocks(workers, schedule, deadline, rng, len(launches), on_block))
            memory.append([(_resident_mib(w.pid), nvml.memory_mib(w.pid) if shape.on_gpu else None) for w in workers])
            if energy and len(launches) == schedule.launches:
                spent = [_joules(worker, time) for worker, time in zip(workers, typical, strict=True)]
    shortest = min(times.shape[1] for times in launches)
    together = np.stack([times[:, :shortest] for times in launches], axis=1)
    return [
        Samples(
            provider, taken, max(m for m, _ in used), max((g for _, g in used if g is not None), default=None), cost
        )
        for provider, taken, used, cost in zip(providers, together, zip(*memory, strict=True), spent, strict=True)
    ]


def _schedule(typical: Sequence[float], seconds: float, opening: float) -> _Schedule:
    launches = int(np.clip(seconds / max(opening, 1e-9), 1, LAUNCHES))
    runs = int(np.clip(VISIT_SECONDS / max(typical), 1, MAX_RUNS))
    least, most = (-(-blocks // launches) for blocks in BLOCKS)
    blocks = int(np.clip(seconds / launches / (sum(typical) * (runs + WAKE_RUNS)), least, most))
    return _Schedule(launches, blocks, least, runs)


def _blocks(
    workers: Sequence[Worker],
    schedule: _Schedule,
    deadline: float,
    rng: np.random.Generator,
    launch: int,
    on_block: Callable[[int, int], None],
) -> np.ndarray:
    """Return the seconds of one launch, [arms, blocks, runs]."""
    times = np.empty((len(workers), schedule.blocks, schedule.runs))
    before, total = launch * schedule.blocks, schedule.launches * schedule.blocks
    for block in range(schedule.blocks):
        if block >= schedule.least and monotonic() > deadline:
            # The machine is busy: take fewer blocks, which widens the intervals.
            on_block(before + schedule.blocks, total)
            return times[:, :block]
        for index in rng.permutation(len(workers)):
            answer = workers[index].ask(op="time", runs=schedule.runs, wake=WAKE_RUNS)
            times[index, block] = np.asarray(answer["ns"]) / 1e9
        on_block(before + block + 1, total)
    return times


def _resident_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def _joules(worker: Worker, typical: float) -> float | None:
    """Return the joules of one run, from NVML's counter around about three seconds of runs, or None without one."""
    runs = max(1, round(ENERGY_SECONDS / typical))
    before = nvml.joules()
    worker.ask(op="time", runs=runs, wake=0)
    after = nvml.joules()
    return None if before is None or after is None else (after - before) / runs


@contextlib.contextmanager
def _workers(labels: Sequence[str], provider: str) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Worker(label, provider)) for label in labels]


def _warm_up(worker: Worker) -> float:
    """Run until the medians of three consecutive windows agree within 5 %; return the median seconds of a run."""
    first = min(worker.ask(op="time", runs=2, wake=0)["ns"]) / 1e9
    runs = int(np.clip(WARMUP_WINDOW_SECONDS / max(first, 1e-9), 3, 1000))
    windows: list[float] = []
    at_least, at_most = WARMUP_WINDOWS
    while len(windows) < at_most:
        windows.append(median(worker.ask(op="time", runs=runs, wake=0)["ns"]) / 1e9)
        last = windows[-at_least:]
        if len(last) == at_least and max(last) <= (1 + WARMUP_TOLERANCE) * min(last):
            break
    return windows[-1]
