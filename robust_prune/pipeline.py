"""The main job: model in, smaller robust model, ONNX file and one table out. Killed runs go on where they were."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__, distributed, stages
from .baseline import fresh_like
from .bench.latency import run as measure_latency
from .bench.types import LatencyTable
from .budget.counting import count_macs, count_params
from .budget.latency import missed
from .budget.types import PruningPlan
from .console import console
from .data.base import random_subset
from .evaluation.card import Accuracy, ResultCard
from .evaluation.evaluate import Evaluation
from .evaluation.examples import make_examples
from .evaluation.hashing import images_hash, models_hash
from .export.types import OnnxArtifact
from .machine.snapshot import snapshot
from .models import artifact, user_file
from .report.files import write as write_report
from .report.table import headline_table
from .report.types import ModelRow, RunReport
from .runs.files import RunDir, claim, digest, write_json, write_text
from .runs.job import Job, StageLog
from .shrink import Shrunk, shrink
from .training.budget import affordable

SCRATCH = "scratch"
SAMPLE_NOTE = (
    "These figures come from the embedded sample of CIFAR-10 (a few hundred test images): they are indicative only."
)


@dataclass(frozen=True)
class Compressed:
    """What a finished run left behind: the report's values and where the files are."""

    report: RunReport
    folder: Path


def compress(job: Job) -> Compressed | None:
    """Runs the whole job, or what is left of it.

    Of several processes (see `processes`) the first one returns what was made; the others leave with None as soon as
    nothing is left to share, so that latency is measured on a machine that is otherwise idle.

    Raises:
        UsageError: the folder holds a run with other inputs.
        QualityGateError: surgery or export produced something that is not equal to what it should be.
        EnvironmentProblem: the machine lacks something.
    """
    recipe, data = job.recipe, job.data
    device, threat = stages.device_of(recipe), stages.threat_of(recipe)
    stages.check_provider(recipe)
    stages.check_images(data)
    key, folder = claim_folder(job)
    dense, todo = job.loaded.model, StageLog(RunDir(folder), key)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_json(folder / "environment.json", snapshot())

    shrunk = shrink(job, todo, folder)
    models = {"dense": dense.cpu().eval(), "pruned": shrunk.model.cpu().eval()}
    scratch_note = ""
    if recipe.baseline.kind == "scratch":
        models[SCRATCH], scratch_note = _from_scratch(job, shrunk, todo, folder)
    files = {label: _export(job, model, label, todo, folder) for label, model in models.items()}
    cards = {label: _evaluate(job, model, label, todo, folder, files[label]) for label, model in models.items()}
    if not distributed.part():
        return None
    rows = [row for label, model in models.items() for row in _rows(job, label, model, cards[label], files[label])]
    examples = make_examples(
        {label: model.to(device) for label, model in models.items() if label != SCRATCH},
        data.test, threat, data.class_names, attacked="pruned", seed=recipe.seed, device=device,
    )  # fmt: skip
    table = _bench(job, rows, todo)
    report = RunReport(
        title=f"{job.name} compressed: {100 * recipe.pruning.ratio:.0f} % of {_unit(recipe.pruning.of)} removed",
        command=job.command,
        recipe=recipe.model_dump(mode="json"),
        notes=(*notes(job, shrunk.plan, table), *([scratch_note] if scratch_note else [])),
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
    written = user_file.versions(job.recipe.finetune.loss)
    key = digest([models_hash(job.loaded.model), job.loaded.spec.to_json(), images, recipe, written, __version__])
    section = job.recipe.pruning
    folder = job.out or Path("runs") / f"{job.name}-{section.of}-{100 * section.ratio:.0f}-{key[:6]}"
    claim(folder, key, job.command)
    return key, folder


def _from_scratch(job: Job, shrunk: Shrunk, todo: StageLog, folder: Path) -> tuple[nn.Module, str]:
    """The pruned architecture trained from fresh weights, as its artifact holds it, and a sentence on its training."""
    recipe, spec = job.recipe, job.loaded.spec
    device, threat, file = stages.device_of(recipe), stages.threat_of(recipe), folder / f"{SCRATCH}.safetensors"
    minutes = recipe.baseline.minutes
    seconds = shrunk.recovery_seconds if minutes is None else 60 * minutes
    identity = models_hash(shrunk.model)

    def make_length() -> dict[str, int]:
        model = fresh_like(spec, shrunk.model, recipe.seed)
        epochs, images = affordable(model, job.data.train, threat, recipe.training, seconds, device=device)
        return {"epochs": epochs, "images": images}

    # A stage of its own: a run that is killed and resumed must not time the machine again and train for another length.
    length = todo.once(f"{SCRATCH}-length", [identity, seconds], make_length, together=True)

    def make() -> dict[str, Any]:
        model = fresh_like(spec, shrunk.model, recipe.seed)
        result = stages.finetune(
            model, replace(job.data, train=random_subset(job.data.train, length["images"], recipe.seed)), threat,
            recipe.training.model_copy(update={"epochs": length["epochs"]}),
            seed=recipe.seed, device=device, checkpoint=folder / SCRATCH / "checkpoint.pt",
        )  # fmt: skip
        artifact.save(file, model.cpu(), spec, threat=threat, provenance={"command": job.command})
        return result.to_json()

    result = todo.once(SCRATCH, [identity, length], make, (file,), together=True)
    took = sum(record["seconds"] for record in result["history"])
    epochs = f"{length['epochs']} epoch{'' if length['epochs'] == 1 else 's'}"
    note = (
        f"{SCRATCH}: the pruned architecture from fresh weights, trained by {recipe.training.loss} for {took:.0f} s "
        f"({epochs} of {length['images']:,} images); fine-tuning the pruned model took "
        f"{shrunk.recovery_seconds:.0f} s. {result['note']}"
    )
    return artifact.load(file, arch=job.arch, trust_source=True).model.eval(), note.strip()


def _export(job: Job, model: nn.Module, label: str, todo: StageLog, folder: Path) -> dict[str, OnnxArtifact]:
    """The files of one model by precision; lower ones of the pruned model only."""
    path = folder / ("model.onnx" if label == "pruned" else f"{label}.onnx")
    section, identity = job.recipe.export, models_hash(model)

    def make() -> dict[str, Any]:
        console.print(f"Exporting {path.name} and checking it against float64")
        return stages.export(model, job.loaded.spec, job.data, path, section.opset, job.recipe.seed).to_json()

    # Paths are those of now: the folder may have been moved since the files were made.
    stored = OnnxArtifact.from_json(todo.once(f"export-{label}", identity, make, (path,)))
    files = {"fp32": replace(stored, path=str(path))}
    if label != "pruned" or not section.precisions:
        return files

    def reduce() -> dict[str, Any]:
        console.print(f"Exporting it in {' and '.join(section.precisions)}")
        found = stages.export_precisions(model, job.data, path, section)
        return {precision: artifact.to_json() for precision, artifact in found.items()}

    paths = tuple(stages.reduced_path(path, precision) for precision in section.precisions)
    reduced = todo.once(f"export-{label}-reduced", [identity, files["fp32"].sha256], reduce, paths)
    for precision, value in reduced.items():
        files[precision] = replace(OnnxArtifact.from_json(value), path=str(stages.reduced_path(path, precision)))
    return files


def _evaluate(
    job: Job, model: nn.Module, label: str, todo: StageLog, folder: Path, files: dict[str, OnnxArtifact]
) -> dict[str, Any]:
    name = f"evaluate-{label}"

    def make() -> dict[str, Any]:
        found: Evaluation = stages.evaluate_model(
            model, job.data, stages.threat_of(job.recipe), job.recipe.evaluation,
            name=label, seed=job.recipe.seed, device=stages.device_of(job.recipe),
            onnx={precision: Path(file.path) for precision, file in files.items()},
            state_path=folder / name / "state.npz", together=True,
        )  # fmt: skip
        return {
            "card": found.card.to_json(),
            "files": {precision: asdict(twin) for precision, twin in found.twins.items()},
        }

    inputs = [models_hash(model), [file.sha256 for file in files.values()]]
    return todo.once(name, inputs, make, together=True)


def _rows(
    job: Job, label: str, model: nn.Module, found: dict[str, Any], files: dict[str, OnnxArtifact]
) -> list[ModelRow]:
    """A row for the model with its fp32 file, and one for each file of lower precision."""
    macs, params = count_macs(model.cpu(), stages.blank_image(job.loaded.spec)), count_params(model)
    return [
        ModelRow(
            label=label if precision == "fp32" else f"{label} {precision}",
            macs=macs,
            params=params,
            file_bytes=file.bytes,
            card=ResultCard.from_json(found["card"]) if precision == "fp32" else None,
            onnx_clean=Accuracy(**found["files"][precision]["clean"]),
            onnx_robust=Accuracy(**found["files"][precision]["robust"]),
            onnx=file,
        )
        for precision, file in files.items()
    ]


def _bench(job: Job, rows: list[ModelRow], todo: StageLog) -> LatencyTable:
    section = job.recipe.bench
    files = [(row.label, row.onnx) for row in rows if row.onnx is not None]

    def make() -> dict[str, Any]:
        return measure_latency(
            [(label, Path(file.path)) for label, file in files],
            batches=section.batches,
            threads=section.threads,
            provider=section.provider,
            kinds=section.kinds,
            seconds_budget=section.seconds * len(section.batches) * len(section.threads) * len(section.kinds),
            seed=job.recipe.seed,
        ).to_json()

    return LatencyTable.from_json(todo.once("bench", [file.sha256 for _, file in files], make))


def notes(job: Job, plan: PruningPlan | None = None, table: LatencyTable | None = None) -> tuple[str, ...]:
    """Sentences that the reader of a report must know."""
    found = [*([SAMPLE_NOTE] if job.data.sample else []), *job.data.notes]
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
