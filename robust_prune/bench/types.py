"""Results of latency measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from ..shown import Shown

UNSTEADY = 1.5
"""Ratio of the 90th percentile to the median above which times are in doubt."""


@dataclass(frozen=True)
class Ratio:
    """Speed-up over the baseline.

    Attributes:
        value: time of the baseline divided by the time of the arm; above 1 if the arm is faster.
        low, high: 95 % bootstrap interval.
        verdict: ``faster``, ``slower`` or ``no difference`` (the interval overlaps the noise floor).
    """

    value: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class LatencyRow:
    """Latency of one file under one set of conditions.

    Attributes:
        label: name of the file in tables, e.g. ``dense`` or ``pruned``.
        path: path of the ONNX file.
        provider: execution provider, as verified.
        kind: ``host`` (arrays in and out), ``device`` (I/O binding), ``graph`` (I/O binding and a CUDA graph) or
            ``defaults`` (arrays in and out, with the threads that ONNX Runtime takes by itself).
        batch: number of images in a run.
        threads: number of intra-op threads; 0 for ONNX Runtime's own choice.
        samples: number of timed runs.
        p50_ms: median time of one run in milliseconds.
        p50_low: lower end of its 95 % bootstrap interval in milliseconds.
        p50_high: upper end of that interval.
        p90_ms: 90th percentile in milliseconds; None with fewer than 64 samples.
        p95_ms: 95th percentile; None with fewer than 130 samples.
        p99_ms: 99th percentile; None with fewer than 662 samples.
        images_per_second: batch size divided by the median time.
        speedup: speed-up over the first file of the table; None for that file.
        noisy: whether the interval of the A/A ratio excludes 1, in which case the row should be measured again.
        launches: number of process launches over which the runs are spread.
        memory_mib: resident memory in MiB, after its runs, of a process with only ONNX Runtime and the model.
        gpu_memory_mib: GPU memory of this process in MiB; None on a CPU or if NVML does not report it.
        millijoules_per_image: energy of all GPUs for one image in millijoules, idle power included; None if it was not
            measured.
        load_per_core: number of runnable processes for each core, averaged over a minute, before or after the
            measurement, whichever is smaller; None if the system does not tell.
    """

    label: str
    path: str
    provider: str
    kind: str
    batch: int
    threads: int
    samples: int
    p50_ms: float
    p50_low: float
    p50_high: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    images_per_second: float
    speedup: Ratio | None
    noisy: bool
    launches: int = 1
    memory_mib: float | None = None
    gpu_memory_mib: float | None = None
    millijoules_per_image: float | None = None
    load_per_core: float | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons to measure this row again on a quiet machine, one clause each."""
        found = []
        if self.noisy:
            found.append("the first file differs from itself")
        if self.p90_ms is not None and self.p90_ms > UNSTEADY * self.p50_ms:
            found.append(f"every tenth run takes {self.p90_ms / self.p50_ms:.1f} times the median or more")
        if self.load_per_core is not None and self.load_per_core > 1:
            found.append(f"the machine had {self.load_per_core:.1f} running processes for each core")
        return tuple(found)


@dataclass(frozen=True, repr=False)
class LatencyTable(Shown):
    """Rows measured together in interleaved blocks.

    Attributes:
        rows: one row for each file, batch size, number of threads and kind.
        noise_floor: A/A ratio (the first file against itself) as (value, low, high), by conditions such as
            ``batch 1 x 2 threads``.
        environment: hardware, versions and load during the measurement.
        protocol: one line that describes the measurement.
    """

    rows: tuple[LatencyRow, ...]
    noise_floor: dict[str, tuple[float, float, float]]
    environment: dict[str, Any]
    protocol: str

    def short(self) -> str:
        """Return the median latencies of the first four rows."""
        shown = [f"{row.label} batch {row.batch}: {row.p50_ms:.3g} ms" for row in self.rows[:4]]
        more = [f"{len(self.rows) - 4} more"] if len(self.rows) > 4 else []
        return ", ".join(shown + more)

    def table(self) -> RenderableType:
        """Return a table of all rows."""
        from .latency import render_latency

        return render_latency(self)
