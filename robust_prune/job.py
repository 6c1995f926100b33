"""What a compression is asked for, what its stages leave, and where their files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from .budget.types import PruningPlan
from .data.base import DataBundle
from .evaluation.card import ResultCard
from .exporters.types import OnnxArtifact
from .machine.device import choose_device
from .models.artifact import Model
from .recipe import Recipe
from .report.types import RunReport
from .runs.run import Run
from .sensitivity.profile import SensitivityProfile
from .shown import Shown
from .structure.types import Skipped
from .training.types import TrainResult


@dataclass(frozen=True)
class Compression:
    """What to compress, on which data, how, and where to.

    Attributes:
        name: how the model is called in tables and folder names.
        dense: the model.
        data: its data set.
        recipe: everything else.
        out: the run folder; None derives one from name, ratio and inputs.
        command: the command line that repeats the run.
        arch: where the user's ``file.py:function`` lies, if that is the architecture.
    """

    name: str
    dense: Model
    data: DataBundle
    recipe: Recipe
    out: Path | None = None
    command: str = ""
    arch: str | None = None

    @property
    def device(self) -> str:
        """Where torch computes, ``cpu`` or ``cuda``."""
        return choose_device(self.recipe.device)


@dataclass(frozen=True, repr=False)
class Compressed(Shown):
    """What a finished run left behind: the report's values and where the files are."""

    report: RunReport
    folder: Path

    def short(self) -> str:
        """What was made, and where it lies."""
        return f"{self.report.short()}, in {self.folder}"

    def table(self) -> RenderableType | None:
        """The headline table."""
        return self.report.table()


@dataclass(frozen=True)
class Planned:
    """Outcome of analysis and planning."""

    profile: SensitivityProfile
    plan: PruningPlan


@dataclass(frozen=True)
class Pruned:
    """Outcome of surgery and repair, beside the model's file.

    Attributes:
        rolled_back: groups that stayed whole, and why.
        parity: largest relative error between the cut model and the masked dense one.
        before_finetune: accuracy on held-out images.
    """

    rolled_back: tuple[Skipped, ...]
    parity: float
    before_finetune: ResultCard


@dataclass(frozen=True)
class Cut:
    """One cut, from its plan to the recovered model; `plan` is what surgery made of it."""

    planned: Planned
    pruned: Pruned
    tuned: TrainResult
    plan: PruningPlan


@dataclass(frozen=True)
class Length:
    """How long a network from scratch is trained: epochs, and images in each."""

    epochs: int
    images: int


@dataclass(frozen=True)
class LowerPrecisions:
    """The files of lower precision of one model, by precision."""

    files: dict[str, OnnxArtifact]


def cut_names(steps: int) -> tuple[str, ...]:
    """What is added to the names of each cut's stages; the last has the plain names, however many came before."""
    return (*(f"-{step}" for step in range(1, steps)), "")


def pruned_file(run: Run, at: str) -> Path:
    """Where the model lies that surgery and repair leave."""
    return run.folder / f"prune{at}" / "model.safetensors"


def recovered_file(run: Run, at: str) -> Path:
    """Where the fine-tuned model lies: that of the last cut is the run's."""
    return (run.folder / f"finetune{at}" if at else run.folder) / "model.safetensors"
