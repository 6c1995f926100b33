"""The main job: model in, smaller robust model, ONNX file and one table out. Killed runs go on where they were."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__, stages
from .bench.latency import run as measure_latency
from .bench.types import LatencyTable
from .console import console
from .data.base import DataBundle
from .environment import snapshot
from .evaluation.card import ResultCard
from .evaluation.evaluate import Evaluation
from .evaluation.examples import make_examples
from .evaluation.hashing import images_hash, models_hash
from .export.types import OnnxArtifact
from .models import artifact
from .models.artifact import Loaded
from .pruning.counting import count_macs, count_params
from .pruning.plan import render_plan
from .pruning.types import PruningPlan, Refused
from .recipe import Recipe
from .report.files import finite
from .report.files import write as write_report
from .report.table import headline_table
from .report.types import ModelRow, RunReport
from .run_dir import RunDir, claim, digest, read_json, write_json, write_text
from .sensitivity.profile import SensitivityProfile

SAMPLE_NOTE = (
    "These figures come from the embedded sample of CIFAR-10 (a few hundred test images): they are indicative only."
)


@dataclass(frozen=True)
class Job:
    """One compression: what to compress, on which data, how, and where to.

    Attributes:
        name: how the model is called in tables and folder names.
        loaded: the dense model.
        data: its data set.
        recipe: everything else.
        out: the run folder; None derives one from name, ratio and inputs.
        command: the command line that repeats the run.
        arch: where the user's ``file.py:function`` lies, if that is the architecture.
    """

    name: str
    loaded: Loaded
    data: DataBundle
    recipe: Recipe
    out: Path | None = None
    command: str = ""
    arch: str | None = None


@dataclass(frozen=True)
class Compressed:
    """What a finished run left behind: the report's values and where the files are."""

    report: RunReport
    folder: Path


class StageLog:
    """Runs a stage, or takes its stored outcome when the same inputs have been through it before."""

    def __init__(self, run: RunDir, key: str) -> None:
        """`key` is the hash of the whole run's inputs; every stage's own inputs are added to it."""
        self.run, self.key, self.seconds = run, key, dict[str, float]()

    def once(self, name: str, inputs: Any, make: Callable[[], Any], files: tuple[Path, ...] = ()) -> Any:
        """The JSON outcome of stage `name`; `files` must exist for a stored one to count."""
        key = digest([self.key, name, inputs])
        stored = self.run.finished(name, key)
        if stored is not None and all(file.exists() for file in files):
            self.seconds[name] = stored["seconds"]
            return stored["value"]
        begin = time.monotonic()
        value = make()
        self.seconds[name] = time.monotonic() - begin
        self.run.finish(name, key, {"value": finite(value), "seconds": self.seconds[name]})
        return value


def make_plan(job: Job) -> tuple[SensitivityProfile, PruningPlan]:
    """Measures sensitivity and plans the cut; nothing is written and the model stays as it is."""
    device = stages.device_of(job.recipe)
    analysis = stages.analyse(job.loaded.model, job.loaded.spec, job.data.train, job.recipe, device)
    return analysis.profile, stages.plan_cut(analysis, job.recipe.pruning)


def compress(job: Job) -> Compressed:
    """Runs the whole job, or what is left of it.

    Raises:
        UsageError: the folder holds a run with other inputs.
        QualityGateError: surgery or export produced something that is not equal to what it should be.
        EnvironmentProblem: the machine lacks something.
    """
    recipe, data = job.recipe, job.data
    device, threat = stages.device_of(recipe), stages.threat_of(job.recipe)
    key, folder = claim_folder(job)
    run, dense = RunDir(folder), job.loaded.model
    todo = StageLog(run, key)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_json(folder / "environment.json", snapshot())

    planned = todo.once("plan", recipe.model_dump(mode="json"), lambda: _plan_json(job))
    profile = SensitivityProfile.from_json(planned["profile"])
    plan = PruningPlan.from_json(planned["plan"])
    console.print(render_plan(plan))
    warn(plan.note)

    small, rolled_back, before = _cut_and_recover(job, plan, todo, folder, threat, device)

    models = {"dense": dense.cpu().eval(), "pruned": small.cpu().eval()}
    onnx = {label: _export(job, model, label, todo, folder) for label, model in models.items()}
    cards = {label: _evaluate(job, model, label, todo, folder, onnx[label]) for label, model in models.items()}
    rows = [_row(job, label, model, cards[label], onnx[label]) for label, model in models.items()]
    examples = make_examples(
        {label: model.to(device) for label, model in models.items()},
        data.test, threat, data.class_names, attacked="pruned", seed=recipe.seed, device=device,
    )  # fmt: skip
    table = _bench(job, onnx, todo, folder)
    report = RunReport(
        title=f"{job.name} compressed: {100 * recipe.pruning.ratio:.0f} % of {_unit(recipe.pruning.of)} removed",
        command=job.command,
        recipe=recipe.model_dump(mode="json"),
        notes=notes(job, plan),
        models=tuple(
            replace(row, latency=tuple(r for r in table.rows if r.label == row.label)) for row in rows
        ),
        profile=profile,
        plan=plan,
        rolled_back=rolled_back,
        history=tuple(read_json(folder / "finetune" / "history.json")["history"]),
        before_finetune=before,
        environment=snapshot() | {"bench": table.environment},
        seconds=todo.seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        latency_protocol=table.protocol,
        noise_floor=table.noise_floor,
    )
    write_report(report, folder, examples)
    show(report, folder)
    return Compressed(report, folder)


def claim_folder(job: Job) -> tuple[str, Path]:
    """The hash of a run's inputs, and its folder, refused when another run's results lie there.

    Raises:
        UsageError: the folder belongs to other inputs, or is a file.
    """
    recipe = job.recipe.model_dump(mode="json")
    images = [images_hash(part) for part in (job.data.train, job.data.validation, job.data.test)]
    key = digest([models_hash(job.loaded.model), job.loaded.spec.to_json(), images, recipe, __version__])
    section = job.recipe.pruning
    folder = job.out or Path("runs") / f"{job.name}-{section.of}-{100 * section.ratio:.0f}-{key[:6]}"
    claim(folder, key, job.command)
    return key, folder


def _plan_json(job: Job) -> dict[str, Any]:
    profile, plan = make_plan(job)
    return {"profile": profile.to_json(), "plan": plan.to_json()}


def _cut_and_recover(
    job: Job, plan: PruningPlan, todo: StageLog, folder: Path, threat: Any, device: str
) -> tuple[nn.Module, tuple[Refused, ...], ResultCard]:
    """Surgery, then fine-tuning; the model comes back as the artifact on disk holds it."""
    recipe, spec, dense = job.recipe, job.loaded.spec, job.loaded.model
    cut_file, final_file = folder / "prune" / "model.safetensors", folder / "model.safetensors"
    provenance = {"command": job.command, "parent": models_hash(dense), "recipe": digest(recipe.model_dump())}

    def make_cut() -> dict[str, Any]:
        console.print("Cutting channels and proving every group against the masked dense model")
        surgery = stages.cut(dense, plan, spec, job.data.train, recipe, device)
        card = stages.score_before_finetune(
            surgery.model, job.data, threat, recipe.evaluation, recipe.seed, device
        )
        artifact.save(cut_file, surgery.model.cpu(), spec, threat=threat, provenance=provenance)
        return {
            "rolled_back": [asdict(r) for r in surgery.rolled_back],
            "parity": surgery.parity,
            "before_finetune": card.to_json(),
        }

    def make_finetune() -> dict[str, Any]:
        model = artifact.load(cut_file, arch=job.arch, trust_source=True).model
        result = stages.finetune(
            model, job.data, threat, recipe.finetune,
            seed=recipe.seed, device=device, checkpoint=folder / "finetune" / "checkpoint.pt",
        )  # fmt: skip
        write_json(folder / "finetune" / "history.json", finite(result.to_json()))
        artifact.save(final_file, model.cpu(), spec, threat=threat, provenance=provenance)
        return {"best_epoch": result.best_epoch, "note": result.note}

    done = todo.once("prune", plan.to_json(), make_cut, (cut_file,))
    tuned = todo.once("finetune", plan.to_json(), make_finetune, (final_file,))
    rolled_back = tuple(Refused(**r) for r in done["rolled_back"])
    for refused in rolled_back:
        warn(f"group {refused.name} stayed whole: {refused.reason}")
    warn(tuned["note"])
    small = artifact.load(final_file, arch=job.arch, trust_source=True).model
    return small, rolled_back, ResultCard.from_json(done["before_finetune"])


def _export(job: Job, model: nn.Module, label: str, todo: StageLog, folder: Path) -> OnnxArtifact:
    path = folder / ("model.onnx" if label == "pruned" else f"{label}.onnx")

    def make() -> dict[str, Any]:
        console.print(f"Exporting {path.name} and checking it against float64")
        return stages.export(
            model, job.loaded.spec, job.data, path, job.recipe.export.opset, job.recipe.seed
        ).to_json()

    return OnnxArtifact.from_json(todo.once(f"export-{label}", models_hash(model), make, (path,)))


def _evaluate(
    job: Job, model: nn.Module, label: str, todo: StageLog, folder: Path, onnx: OnnxArtifact
) -> dict[str, Any]:
    name = f"evaluate-{label}"

    def make() -> dict[str, Any]:
        found: Evaluation = stages.evaluate_model(
            model, job.data, stages.threat_of(job.recipe), job.recipe.evaluation,
            name=label, seed=job.recipe.seed, device=stages.device_of(job.recipe),
            onnx=Path(onnx.path), state_path=folder / name / "state.npz",
        )  # fmt: skip
        return {
            "card": found.card.to_json(),
            "onnx_clean": asdict(found.twin_clean) if found.twin_clean else None,
            "onnx_robust": asdict(found.twin_robust) if found.twin_robust else None,
        }

    return todo.once(name, [models_hash(model), onnx.sha256], make)


def _row(job: Job, label: str, model: nn.Module, found: dict[str, Any], onnx: OnnxArtifact) -> ModelRow:
    row = ModelRow.from_json(
        {
            "label": label,
            "macs": count_macs(model.cpu(), stages.blank_image(job.loaded.spec)),
            "params": count_params(model),
            "file_bytes": onnx.bytes,
            "onnx": None,
            "latency": [],
            **found,
        }
    )
    return replace(row, onnx=onnx)


def _bench(job: Job, onnx: dict[str, OnnxArtifact], todo: StageLog, folder: Path) -> LatencyTable:
    section = job.recipe.bench
    files = [(label, Path(found.path)) for label, found in onnx.items()]

    def make() -> dict[str, Any]:
        return measure_latency(
            files,
            batches=section.batches,
            threads=section.threads,
            provider=section.provider,
            seconds_budget=section.seconds * len(section.batches) * len(section.threads),
            seed=job.recipe.seed,
        ).to_json()

    stored = todo.once("bench", [found.sha256 for found in onnx.values()], make)
    return LatencyTable.from_json(stored)


def notes(job: Job, plan: PruningPlan | None = None) -> tuple[str, ...]:
    """Sentences that the reader of a report must know."""
    found = [SAMPLE_NOTE] if job.data.sample else []
    if plan is not None and plan.note:
        found.append(plan.note)
    return tuple(found)


def show(report: RunReport, folder: Path) -> None:
    """Prints the final table and where the files are."""
    console.print(headline_table(report))
    for note in report.notes:
        console.print(f"Note: {note}", markup=False)
    console.print(f"{folder / 'report.html'}  {folder / 'model.onnx'}  {folder / 'model.safetensors'}", markup=False)


def warn(text: str) -> None:
    """Prints a warning, if there is one."""
    if text:
        console.print(f"Note: {text}", markup=False)


def _unit(of: str) -> str:
    return {"macs": "MACs", "params": "parameters", "channels": "channels"}[of]
