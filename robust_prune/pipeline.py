"""The main job: model in, smaller robust model, ONNX file and one table out. Killed runs go on where they were."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__, stages
from .bench.latency import run as measure_latency
from .bench.types import LatencyTable
from .console import console
from .environment import snapshot
from .evaluation.evaluate import Evaluation
from .evaluation.examples import make_examples
from .evaluation.hashing import images_hash, models_hash
from .export.types import OnnxArtifact
from .job import Job, StageLog
from .latency_budget import missed
from .pruning.counting import count_macs, count_params
from .pruning.types import PruningPlan
from .report.files import write as write_report
from .report.table import headline_table
from .report.types import ModelRow, RunReport
from .run_dir import RunDir, claim, digest, write_json, write_text
from .shrink import shrink

SAMPLE_NOTE = (
    "These figures come from the embedded sample of CIFAR-10 (a few hundred test images): they are indicative only."
)


@dataclass(frozen=True)
class Compressed:
    """What a finished run left behind: the report's values and where the files are."""

    report: RunReport
    folder: Path


def compress(job: Job) -> Compressed:
    """Runs the whole job, or what is left of it.

    Raises:
        UsageError: the folder holds a run with other inputs.
        QualityGateError: surgery or export produced something that is not equal to what it should be.
        EnvironmentProblem: the machine lacks something.
    """
    recipe, data = job.recipe, job.data
    device, threat = stages.device_of(recipe), stages.threat_of(recipe)
    stages.check_provider(recipe)
    key, folder = claim_folder(job)
    dense, todo = job.loaded.model, StageLog(RunDir(folder), key)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_json(folder / "environment.json", snapshot())

    shrunk = shrink(job, todo, folder)
    models = {"dense": dense.cpu().eval(), "pruned": shrunk.model.cpu().eval()}
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
        notes=notes(job, shrunk.plan, table),
        models=tuple(replace(row, latency=tuple(r for r in table.rows if r.label == row.label)) for row in rows),
        profile=shrunk.profile,
        plan=shrunk.plan,
        rolled_back=shrunk.rolled_back,
        history=shrunk.history,
        before_finetune=shrunk.before_finetune,
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


def _export(job: Job, model: nn.Module, label: str, todo: StageLog, folder: Path) -> OnnxArtifact:
    path = folder / ("model.onnx" if label == "pruned" else f"{label}.onnx")

    def make() -> dict[str, Any]:
        console.print(f"Exporting {path.name} and checking it against float64")
        return stages.export(model, job.loaded.spec, job.data, path, job.recipe.export.opset, job.recipe.seed).to_json()

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


def notes(job: Job, plan: PruningPlan | None = None, table: LatencyTable | None = None) -> tuple[str, ...]:
    """Sentences that the reader of a report must know."""
    found = [SAMPLE_NOTE] if job.data.sample else []
    if plan is not None and plan.note:
        found.append(plan.note)
    section = job.recipe.pruning
    if table is not None and section.of == "latency" and (sentence := missed(table, job.recipe.bench, section.ratio)):
        found.append(sentence)
    return tuple(found)


def show(report: RunReport, folder: Path) -> None:
    """Prints the final table and where the files are."""
    console.print(headline_table(report))
    for note in report.notes:
        console.print(f"Note: {note}", markup=False)
    console.print(f"{folder / 'report.html'}  {folder / 'model.onnx'}  {folder / 'model.safetensors'}", markup=False)


def _unit(of: str) -> str:
    return {"macs": "MACs", "params": "parameters", "channels": "channels", "latency": "the latency"}[of]
