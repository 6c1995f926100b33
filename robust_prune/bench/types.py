"""Latency measurements as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..shown import Shown


@dataclass(frozen=True)
class Ratio:
    """Baseline time divided by this arm's time (above 1 is faster), with its 95 % bootstrap interval.

    `verdict` is ``faster``, ``slower`` or ``no difference`` (the interval touches the noise floor).
    """

    value: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class LatencyRow:
    """One file at one batch size under one provider.

    Attributes:
        label: how the table names the file, e.g. ``dense`` or ``pruned``.
        path: the ONNX file.
        provider: the execution provider that was proven to run it.
        kind: ``host`` (arrays in and out), ``device`` (I/O binding) or ``graph`` (that, replayed as a CUDA graph).
        batch: images in one run.
        threads: of the session.
        samples: number of timed runs.
        launches: over how many starts of the process they are spread.
        p50_ms: median time of one run in milliseconds.
        p50_low: lower end of its 95 % interval.
        p50_high: upper end of its 95 % interval.
        p90_ms: time below which 90 % of the runs are; None with fewer than 64 samples.
        p95_ms: the same for 95 %; None with fewer than 130 samples.
        p99_ms: the same for 99 %; None with fewer than 662 samples.
        images_per_second: batch / p50.
        speedup: against the first file of the table; None for that file.
        noisy: True when the A/A ratio's interval excludes 1, so that the row should be measured again.
        memory_mib: resident memory of a process that holds only ONNX Runtime and the model, after its runs.
        gpu_memory_mib: its memory on the GPU; None on a CPU, or where NVML does not tell.
        millijoules_per_image: energy of all GPUs for one image, idle power included; None unless asked for.
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


@dataclass(frozen=True, repr=False)
class LatencyTable(Shown):
    """Rows measured together in interleaved blocks.

    Attributes:
        rows: one a file, batch size and thread count.
        noise_floor: A/A ratio (the first file against itself) by "batch x threads (kind)" key, as [value, low, high].
        environment: hardware, versions and load at the time.
        protocol: one line that says how it was measured.
    """

    rows: tuple[LatencyRow, ...]
    noise_floor: dict[str, tuple[float, float, float]]
    environment: dict[str, Any]
    protocol: str

    def short(self) -> str:
        """Medians of the first rows."""
        shown = [f"{row.label} batch {row.batch}: {row.p50_ms:.3g} ms" for row in self.rows[:4]]
        more = [f"{len(self.rows) - 4} more"] if len(self.rows) > 4 else []
        return ", ".join(shown + more)

    def table(self) -> Table:
        """Latencies side by side."""
        from .latency import render_latency

        return render_latency(self)
