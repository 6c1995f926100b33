"""Latency of pruning candidates: each is exported to a temporary file and timed against the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from ..budget.analysis import Analysis
from ..budget.latency_cost import with_latency
from ..budget.latency_search import TOLERANCE
from ..console import working
from ..data.base import ImageSet
from ..exporters.onnx import export_model
from ..models.spec import ModelSpec
from ..recipe import BenchSection, Recipe
from .latency import DEFAULTS, run_section
from .layer_times import file_seconds, layer_seconds
from .types import LatencyTable

SECONDS_SHARE = 0.5
"""Share of the recipe's time for each row; the selected candidate is measured again as the final file."""


@dataclass(frozen=True)
class CandidateClock:
    """Times candidates against the dense model, in interleaved blocks, under the recipe's first conditions.

    Attributes:
        spec: specification of the dense model.
        images: training images for the parity check of exports.
        recipe: recipe with the sections ``bench`` and ``export``; its first batch size, thread count and kind are used.
        folder: temporary folder of the files.
    """

    spec: ModelSpec
    images: ImageSet
    recipe: Recipe
    folder: Path

    @classmethod
    @contextmanager
    def open(cls, dense: nn.Module, spec: ModelSpec, images: ImageSet, recipe: Recipe) -> Iterator[CandidateClock]:
        """Yield a clock whose temporary folder, with the file of the dense model, is deleted on exit."""
        with TemporaryDirectory() as folder:
            clock = cls(spec, images, recipe, Path(folder))
            clock._export(dense, "dense")
            yield clock

    def few(self) -> BenchSection:
        """Return the bench section with the first conditions alone, and less time."""
        bench = self.recipe.bench
        return bench.model_copy(
            update={
                "batches": bench.batches[:1], "threads": bench.threads[:1], "kinds": bench.kinds[:1],
                "seconds": bench.seconds * SECONDS_SHARE,
            }
        )  # fmt: skip

    def kept(self, model: nn.Module) -> float:
        """Return the latency of `model` divided by that of the dense model, > 0.

        Raises:
            QualityGateError: the exported file differs from the model.
            UsageError, EnvironmentProblem: as `export_onnx` and `run`.
        """
        files = [("dense", self.folder / "dense.onnx"), ("candidate", self._export(model, "candidate"))]
        speedup = run_section(files, self.few(), self.recipe.seed).rows[1].speedup
        assert speedup is not None
        return 1 / speedup.value

    def priced(self, analysis: Analysis, model: nn.Module) -> Analysis:
        """Return the analysis of `model` with latency among its costs, from layers that are timed alone.

        On other providers than the CPU it is returned as it is: a GPU overlaps layers, whose times do not add up.

        Raises:
            QualityGateError, UsageError, EnvironmentProblem: as `kept`.
        """
        bench = self.recipe.bench
        if bench.provider != "cpu":
            return analysis
        threads = _threads(bench)
        images = self.spec.blank_image().repeat(bench.batches[0], 1, 1, 1)
        whole = file_seconds(self._export(model, "present"), tuple(images.shape), bench.provider, threads)
        cost = with_latency(
            analysis.cost, model.cpu(), images, analysis.search.groups, analysis.branches, whole,
            partial(layer_seconds, provider=bench.provider, threads=threads),
        )  # fmt: skip
        return replace(analysis, cost=cost)

    def _export(self, model: nn.Module, name: str) -> Path:
        path = self.folder / f"{name}.onnx"
        export_model(model, self.spec, self.images, path, self.recipe.export, self.recipe.seed)
        return path


@dataclass(frozen=True)
class DenseLatency:
    """Median latency of the dense model, alone, under the recipe's first conditions."""

    milliseconds: float


def median_alone(dense: nn.Module, spec: ModelSpec, images: ImageSet, recipe: Recipe) -> DenseLatency:
    """Export the dense model to a temporary file and time it alone.

    Args:
        dense: the dense model.
        spec: its specification.
        images: training images for the parity check of the export.
        recipe: recipe with the sections ``bench`` and ``export``; its first batch size, thread count and kind are used.

    Raises:
        QualityGateError, UsageError, EnvironmentProblem: as `CandidateClock.kept`.
    """
    with working("Timing the dense model"), CandidateClock.open(dense, spec, images, recipe) as clock:
        (row,) = run_section([("dense", clock.folder / "dense.onnx")], clock.few(), recipe.seed).rows
    return DenseLatency(row.p50_ms)


def conditions(bench: BenchSection) -> str:
    """Return the conditions of a latency budget, e.g. ``batch 1, 1 thread, cpu``."""
    threads = _threads(bench)
    counted = f"{threads} thread{'' if threads == 1 else 's'}" if threads else "ONNX Runtime's own threads"
    return f"batch {bench.batches[0]}, {counted}, {bench.provider}"


def _threads(bench: BenchSection) -> int:
    return 0 if bench.kinds[0] == DEFAULTS else bench.threads[0]


def missed(table: LatencyTable, bench: BenchSection, ratio: float) -> str:
    """Return a sentence if the final measurement misses the latency budget, else an empty string.

    Args:
        table: final measurement, whose rows of the pruned model are labelled ``pruned``.
        bench: bench section under which the budget was measured.
        ratio: share of the latency to remove, in (0, 1).
    """
    for row in table.rows:
        measured = (row.batch, row.threads, row.kind) == (bench.batches[0], _threads(bench), bench.kinds[0])
        if row.label == "pruned" and measured and row.speedup is not None:
            kept = 1 / row.speedup.value
            if abs(kept / (1 - ratio) - 1) > TOLERANCE:
                return (
                    f"the final file takes {kept:.1%} of the dense latency ({conditions(bench)}), "
                    f"{1 - ratio:.1%} was asked for."
                )
    return ""
