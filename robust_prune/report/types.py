"""Everything that a report says, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from .. import __version__
from ..bench.types import LatencyRow
from ..budget.types import PruningPlan
from ..evaluation.card import Accuracy, ResultCard
from ..exporters.types import OnnxArtifact
from ..sensitivity.profile import SensitivityProfile
from ..shown import Shown
from ..structure.types import Skipped
from ..training.types import EpochRecord


@dataclass(frozen=True)
class ModelRow:
    """What is known of one model.

    Attributes:
        label: how tables name it, e.g. ``dense`` or ``pruned``.
        macs: multiply-accumulates for one image.
        params: number of parameters.
        file_bytes: size of its ONNX file, where there is one.
        card: accuracy of the torch model.
        onnx_clean: accuracy of the ONNX file itself without an attack.
        onnx_robust: accuracy of the ONNX file at the worst points found on the torch model.
        onnx: the exported file and its parity.
        latency: measurements of the file, one a batch size, thread count and kind.
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
    """A whole run.

    Attributes:
        title: heading of the report.
        command: the command line that repeats the run.
        recipe: the resolved recipe.
        notes: sentences that the reader must know, such as "figures on the embedded sample are indicative".
        models: the first is the one the others are compared with.
        profile: the sensitivity measurement.
        plan: the cut.
        rolled_back: groups whose surgery failed its checks, and why.
        history: one record an epoch of (fine-)tuning.
        before_finetune: accuracy right after the cut.
        environment: hardware, versions and load.
        seconds: wall time by stage.
        created: when the report was made, ISO 8601.
        version: of robust-prune.
        latency_protocol: one line saying how latency was measured.
        noise_floor: A/A ratio by measurement, as (value, low, high).
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
    before_finetune: ResultCard | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = __version__
    latency_protocol: str = ""
    noise_floor: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def short(self) -> str:
        """Title and models."""
        return f"{self.title}: {', '.join(model.label for model in self.models)}"

    def table(self) -> Table:
        """The headline table."""
        from .table import headline_table

        return headline_table(self)
