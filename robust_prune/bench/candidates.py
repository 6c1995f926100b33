"""The latency of models that are only candidates: exported, timed against the dense model, and forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from ..budget.latency import TOLERANCE
from ..data.base import ImageSet
from ..exporters.onnx import export_model
from ..models.spec import ModelSpec
from ..recipe import BenchSection, Recipe
from .latency import run_section
from .types import LatencyTable

SECONDS_SHARE = 0.5
"""Of a recipe's time for a row; a candidate is measured once more, as the final file, if it is taken."""


@dataclass(frozen=True)
class CandidateClock:
    """Times candidates against the dense model, in interleaved blocks, at the recipe's first batch size and threads."""

    spec: ModelSpec
    images: ImageSet
    recipe: Recipe
    folder: Path

    @classmethod
    @contextmanager
    def open(cls, dense: nn.Module, spec: ModelSpec, images: ImageSet, recipe: Recipe) -> Iterator[CandidateClock]:
        """A clock with the dense model's file in a folder that goes when the clock does."""
        with TemporaryDirectory() as folder:
            clock = cls(spec, images, recipe, Path(folder))
            clock._export(dense, "dense")
            yield clock

    def kept(self, model: nn.Module) -> float:
        """Latency of `model` over that of the dense one, > 0.

        Raises:
            QualityGateError: the exported file is not equal to the model.
        """
        bench = self.recipe.bench
        few = bench.model_copy(
            update={
                "batches": bench.batches[:1], "threads": bench.threads[:1], "kinds": bench.kinds[:1],
                "seconds": bench.seconds * SECONDS_SHARE,
            }
        )  # fmt: skip
        files = [("dense", self.folder / "dense.onnx"), ("candidate", self._export(model, "candidate"))]
        speedup = run_section(files, few, self.recipe.seed).rows[1].speedup
        assert speedup is not None
        return 1 / speedup.value

    def _export(self, model: nn.Module, name: str) -> Path:
        path = self.folder / f"{name}.onnx"
        export_model(model, self.spec, self.images, path, self.recipe.export, self.recipe.seed)
        return path


def conditions(bench: BenchSection) -> str:
    """What a latency budget is measured under, as in ``batch 1, 1 thread, cpu``."""
    threads = bench.threads[0]
    return f"batch {bench.batches[0]}, {threads} thread{'' if threads == 1 else 's'}, {bench.provider}"


def missed(table: LatencyTable, bench: BenchSection, ratio: float) -> str:
    """A sentence if the final measurement does not keep the budget, else an empty string.

    Args:
        table: with rows labelled ``pruned``.
        bench: that the budget was measured under.
        ratio: share of the latency to remove.
    """
    for row in table.rows:
        same = row.batch == bench.batches[0] and row.threads == bench.threads[0]
        if row.label == "pruned" and same and row.speedup is not None:
            kept = 1 / row.speedup.value
            if abs(kept / (1 - ratio) - 1) > TOLERANCE:
                return (
                    f"the final file takes {kept:.1%} of the dense latency ({conditions(bench)}), "
                    f"{1 - ratio:.1%} was asked for."
                )
    return ""
