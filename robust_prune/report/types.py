"""Everything that a report says, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..bench.types import LatencyRow, Ratio
from ..budget.types import PruningPlan
from ..evaluation.card import Accuracy, ResultCard
from ..export.types import OnnxArtifact
from ..sensitivity.profile import SensitivityProfile
from ..structure.types import Refused


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

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return {
            "label": self.label,
            "macs": self.macs,
            "params": self.params,
            "file_bytes": self.file_bytes,
            "card": self.card.to_json() if self.card else None,
            "onnx_clean": _accuracy_json(self.onnx_clean),
            "onnx_robust": _accuracy_json(self.onnx_robust),
            "onnx": self.onnx.to_json() if self.onnx else None,
            "latency": [asdict(row) for row in self.latency],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelRow:
        """The row that `to_json` wrote."""
        return cls(
            label=value["label"],
            macs=value["macs"],
            params=value["params"],
            file_bytes=value["file_bytes"],
            card=ResultCard.from_json(value["card"]) if value["card"] else None,
            onnx_clean=_accuracy(value["onnx_clean"]),
            onnx_robust=_accuracy(value["onnx_robust"]),
            onnx=OnnxArtifact.from_json(value["onnx"]) if value["onnx"] else None,
            latency=tuple(
                LatencyRow(**{**row, "speedup": Ratio(**row["speedup"]) if row["speedup"] else None})
                for row in value["latency"]
            ),
        )


@dataclass(frozen=True)
class RunReport:
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
        history: one dict an epoch: ``epoch, train_loss, val_clean, val_robust, lr, seconds``; accuracies in [0, 1].
        before_finetune: accuracy right after the cut.
        environment: hardware, versions and load.
        seconds: wall time by stage.
        created: when the run ended, ISO 8601, or empty.
        version: of robust-prune, or empty.
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
    rolled_back: tuple[Refused, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    before_finetune: ResultCard | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    created: str = ""
    version: str = ""
    latency_protocol: str = ""
    noise_floor: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "title": self.title,
            "command": self.command,
            "created": self.created,
            "version": self.version,
            "notes": list(self.notes),
            "models": [model.to_json() for model in self.models],
            "before_finetune": self.before_finetune.to_json() if self.before_finetune else None,
            "latency_protocol": self.latency_protocol,
            "noise_floor": {key: list(value) for key, value in self.noise_floor.items()},
            "history": [dict(epoch) for epoch in self.history],
            "rolled_back": [asdict(group) for group in self.rolled_back],
            "plan": self.plan.to_json() if self.plan else None,
            "profile": self.profile.to_json() if self.profile else None,
            "seconds": dict(self.seconds),
            "environment": self.environment,
            "recipe": self.recipe,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunReport:
        """The report that `to_json` wrote."""
        return cls(
            title=value["title"],
            command=value["command"],
            recipe=value["recipe"],
            notes=tuple(value["notes"]),
            models=tuple(ModelRow.from_json(model) for model in value["models"]),
            profile=SensitivityProfile.from_json(value["profile"]) if value["profile"] else None,
            plan=PruningPlan.from_json(value["plan"]) if value["plan"] else None,
            rolled_back=tuple(Refused(**group) for group in value["rolled_back"]),
            history=tuple(value["history"]),
            before_finetune=ResultCard.from_json(value["before_finetune"]) if value["before_finetune"] else None,
            environment=value["environment"],
            seconds=value["seconds"],
            created=value["created"],
            version=value["version"],
            latency_protocol=value["latency_protocol"],
            noise_floor={k: (v[0], v[1], v[2]) for k, v in value["noise_floor"].items()},
        )


def _accuracy_json(accuracy: Accuracy | None) -> dict[str, Any] | None:
    if accuracy is None:
        return None
    return {**asdict(accuracy), "value": accuracy.value, "interval": list(accuracy.interval)}


def _accuracy(value: dict[str, Any] | None) -> Accuracy | None:
    return Accuracy(value["correct"], value["total"]) if value else None
