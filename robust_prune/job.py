"""Inputs of a compression, results of its stages, and paths of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from torch import nn

from .budget.types import PruningPlan
from .data.base import DataBundle
from .exporters.types import OnnxArtifact
from .introspect.fingerprint import images_hash, models_hash
from .machine.device import choose_device
from .models import artifact, user_file
from .models.artifact import Model
from .recipe import Recipe
from .report.rows import DENSE, PRUNED, SCRATCH
from .report.types import ModelRow, RunReport
from .runs.cache import Cache
from .runs.run import Run
from .sensitivity.profile import SensitivityProfile
from .serialization import to_json
from .shown import Shown
from .structure.types import Skipped
from .training.types import TrainResult


@dataclass(frozen=True)
class Compression:
    """Inputs of a compression.

    Attributes:
        name: name of the model in tables and folder names.
        dense: the dense model.
        data: data set.
        recipe: all settings.
        out: run folder; None derives it from name, metric, ratio and inputs.
        command: command line that reproduces the run.
        cache: results of the dense model, which runs share.
        notes: sentences to show with the results.
    """

    name: str
    dense: Model
    data: DataBundle
    recipe: Recipe
    out: Path | None = None
    command: str = ""
    cache: Cache = field(default_factory=Cache)
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Device of torch, ``cpu`` or ``cuda``."""
        return choose_device(self.recipe.device)

    def at(self, ratio: float) -> Compression:
        """Return the compression by another ratio."""
        section = self.recipe.pruning.model_copy(update={"ratio": ratio})
        return replace(self, recipe=self.recipe.model_copy(update={"pruning": section}))

    @cached_property
    def model_identity(self) -> list[Any]:
        """JSON values that identify the dense model."""
        return [models_hash(self.dense.module), to_json(self.dense.spec)]

    @cached_property
    def images_identity(self) -> dict[str, str]:
        """Hashes of the images and labels of each split."""
        data = self.data
        return {
            "train": images_hash(data.train),
            "held-out": images_hash(data.validation),
            "test": images_hash(data.test),
        }

    @property
    def identity(self) -> tuple[list[Any], list[str]]:
        """JSON values that identify the dense model and all images."""
        return self.model_identity, list(self.images_identity.values())

    @property
    def functions(self) -> tuple[str, ...]:
        """Choices of the recipe that may be functions in users' files."""
        recipe = self.recipe
        return (
            recipe.finetune.loss, recipe.training.loss, recipe.pruning.criterion, recipe.pruning.allocation,
            recipe.evaluation.tier,
        )  # fmt: skip

    @cached_property
    def code(self) -> list[str]:
        """Hashes of the users' files among `functions`, as they are when the compression begins."""
        return user_file.versions(*self.functions)

    def reuse(self, stage: str, batch_size: int = 0, files: Sequence[str] = ()) -> list[Any]:
        """Return JSON values of all that the result of a stage of the dense model depends on.

        Args:
            stage: ``preflight``, ``dense``, or the name of the stage that exports or evaluates the dense model.
            batch_size: images in each batch of ``preflight``.
            files: hashes of the exported files that are evaluated.
        """
        recipe, images = self.recipe, self.images_identity
        threat, evaluation = to_json(recipe.threat_model), recipe.evaluation
        own: dict[str, list[Any]] = {
            "preflight": [images["train"], batch_size],
            "dense": [images["train"], images["held-out"], threat, self.device],
            f"export-{DENSE}": [images["train"], recipe.export.model_dump(mode="json")],
            f"evaluate-{DENSE}": [
                images["test"], self.data.name, threat, evaluation.model_dump(mode="json"),
                user_file.versions(evaluation.tier), self.device, *files,
            ],
        }  # fmt: skip
        return [*self.model_identity, recipe.seed, *own[stage]]


@dataclass(frozen=True, repr=False)
class Compressed(Shown):
    """Result of a compression: its report and its run folder."""

    report: RunReport
    folder: Path

    def short(self) -> str:
        """Return the title of the report, the models and the folder."""
        return f"{self.report.short()}, in {self.folder}"

    def table(self) -> RenderableType | None:
        """Return the headline table."""
        return self.report.table()


@dataclass(frozen=True)
class Planned:
    """Result of analysis and planning: the sensitivity profile and the plan."""

    profile: SensitivityProfile
    plan: PruningPlan


@dataclass(frozen=True)
class Pruned:
    """Result of surgery and repair, in addition to the model file.

    Attributes:
        rolled_back: groups that were not cut, with the reasons.
        parity: largest relative error between the pruned model and the masked dense model.
    """

    rolled_back: tuple[Skipped, ...]
    parity: float


@dataclass(frozen=True)
class Cut:
    """Results of one cut, from the plan to the fine-tuned model.

    Attributes:
        planned: profile and plan.
        pruned: result of surgery and repair.
        tuned: result of fine-tuning.
        plan: the plan as surgery carried it out.
    """

    planned: Planned
    pruned: Pruned
    tuned: TrainResult
    plan: PruningPlan


@dataclass(frozen=True)
class Recovered:
    """A compression up to the last fine-tuning.

    Attributes:
        cuts: results of each cut.
        model: the pruned and fine-tuned model.
        dense: the exported file of the dense model, by precision.
        notes: sentences to show with the results.
    """

    cuts: tuple[Cut, ...]
    model: nn.Module
    dense: Mapping[str, OnnxArtifact]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """A compression of which all but the latency is known.

    Attributes:
        cuts: results of each cut.
        models: the models by label, on the CPU in eval mode; the dense one is the first.
        rows: row of each model and file in the report, without latency.
        notes: sentences to show with the results.
    """

    cuts: tuple[Cut, ...]
    models: Mapping[str, nn.Module]
    rows: tuple[ModelRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Length:
    """Length of training from scratch: number of epochs and of images in each epoch."""

    epochs: int
    images: int


@dataclass(frozen=True)
class LowerPrecisions:
    """Files of lower precision of a model, by precision."""

    files: dict[str, OnnxArtifact]


def cut_names(cuts: int) -> tuple[str, ...]:
    """Return the suffix of the stage names of each cut; that of the last cut is empty."""
    return (*(f"-{cut}" for cut in range(1, cuts)), "")


def stage_titles(recipe: Recipe) -> dict[str, str]:
    """Return what the stages of a compression do, by their names, in the order in which they run."""
    titles = {
        "preflight": "Trial of the model on a few images",
        f"export-{DENSE}": f"Export of {onnx_name(DENSE)}, checked against float64",
        "dense": "Robustness of the dense model",
    }
    cuts, precisions = cut_names(recipe.pruning.cuts), recipe.export.precisions
    for number, at in enumerate(cuts, start=1):
        which = f" (cut {number} of {len(cuts)})" if len(cuts) > 1 else ""
        titles |= {
            f"plan{at}": f"Sensitivity and plan{which}",
            f"prune{at}": f"Cut and repair{which}",
            f"finetune{at}": f"Fine-tuning{which}",
        }
    labels = [DENSE, PRUNED]
    if recipe.baseline.kind == "scratch":
        labels.append(SCRATCH)
        titles |= {f"{SCRATCH}-length": "Speed of training from scratch", SCRATCH: "Training from scratch"}
    for label in labels[1:]:
        titles[f"export-{label}"] = f"Export of {onnx_name(label)}, checked against float64"
        if label == PRUNED and precisions:
            titles[f"export-{label}-reduced"] = f"Export in {' and '.join(precisions)}"
    titles |= {f"evaluate-{label}": f"Evaluation of the {label} model on test images" for label in labels}
    return titles | {"bench": "Latency", "report": "Report"}


def onnx_name(label: str) -> str:
    """Return the name of the ONNX file of a model of the run; that of the pruned one is the result."""
    return "model.onnx" if label == PRUNED else f"{label}.onnx"


def pruned_file(run: Run, at: str) -> Path:
    """Return the path of the model after surgery and repair; `at` is the suffix of the cut."""
    return run.folder / f"prune{at}" / "model.safetensors"


def recovered_file(run: Run, at: str) -> Path:
    """Return the path of the fine-tuned model; that of the last cut is in the run folder itself."""
    return (run.folder / f"finetune{at}" if at else run.folder) / "model.safetensors"


def reopen(job: Compression, file: Path) -> nn.Module:
    """Load a model that this run has written."""
    return artifact.load(file, known=job.dense.spec).module
