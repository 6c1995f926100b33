"""Contents of a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType

from .. import __version__
from ..bench.types import LatencyRow
from ..budget.types import PruningPlan
from ..evaluation.card import Accuracy, ResultCard
from ..exporters.types import OnnxArtifact
from ..sensitivity.profile import SensitivityProfile
from ..shown import Shown
from ..structure.types import Skipped
from ..training.types import EpochRecord, Start


@dataclass(frozen=True)
class ModelRow:
    """Results of one model.

    Attributes:
        label: name in tables, e.g. ``dense`` or ``pruned``.
        macs: multiply-accumulates for one image.
        params: number of parameters.
        file_bytes: size of its ONNX file in bytes; None without a file.
        card: accuracy of the torch model.
        onnx_clean: accuracy of the ONNX file without an attack.
        onnx_robust: accuracy of the ONNX file under attack; see `ExportedAccuracy.robust`.
        onnx: the exported file and its parity.
        latency: latency of the file for each batch size, number of threads and kind.
    """

    label: str
    macs: int
    params: int
    file_bytes: int | None = None
    card: ResultCard | None = None
    onnx_clean: Accuracy | None = None
    onnx_robust: Accuracy | None = None
    onnx: OnnxArtifact | None = None
    latency: tuple[LatencyRow, ...] = ()


@dataclass(frozen=True, repr=False)
class RunReport(Shown):
    """Results of a run.

    Attributes:
        title: heading of the report.
        command: command line that reproduces the run.
        recipe: the resolved recipe.
        notes: sentences to show with the results, such as "figures on the embedded sample are indicative".
        models: results of each model; the first one is the baseline.
        profile: sensitivity profile of the dense model.
        plan: the plan as it was carried out.
        rolled_back: groups whose cut failed its proof, with the reasons; with several cuts those of the last one.
        history: records of the epochs of training, or of fine-tuning after the last cut.
        start: accuracy on held-out images before the first of these epochs.
        environment: hardware, versions and load.
        seconds: wall time of each stage in seconds.
        created: time of the report, ISO 8601.
        version: version of robust-prune.
        latency_protocol: one line that describes the latency measurement.
        noise_floor: A/A ratio by conditions, as (value, low, high).
        class_names: name of each class.
    """

    title: str
    command: str
    recipe: dict[str, Any]
    notes: tuple[str, ...]
    models: tuple[ModelRow, ...]
    profile: SensitivityProfile | None = None
    plan: PruningPlan | None = None
    rolled_back: tuple[Skipped, ...] = ()
    history: tuple[EpochRecord, ...] = ()
    start: Start | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = __version__
    latency_protocol: str = ""
    noise_floor: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()

    def short(self) -> str:
        """Return the title and the labels of the models."""
        return f"{self.title}: {', '.join(model.label for model in self.models)}"

    def table(self) -> RenderableType:
        """Return the headline table."""
        from .table import headline_table

        return headline_table(self)
