"""Compression of a robust model: pruning, fine-tuning, export, evaluation, latency and report.

`compress` calls the stages in order. Each stage maps values to values, which the run folder stores, so that an
interrupted run is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from . import distributed
from .baseline import train_from_scratch
from .bench.candidates import CandidateClock, conditions
from .bench.latency import check_section
from .budget.analysis import Analysis, analyse
from .budget.counting import count_macs, count_params
from .budget.iterative import dense_widths, realised, remaining_ratio
from .budget.latency_search import plan_for_latency
from .budget.measured import Measured
from .budget.plan import make_plan, render_plan
from .budget.types import PruningPlan
from .console import console, warn, working
from .data.base import ImageSet, stratified
from .evaluation.card import ResultCard
from .evaluation.dense_check import DenseCheck, check_dense
from .evaluation.evaluate import Subject, evaluate
from .evaluation.onnx_scores import OnnxModel
from .exporters.onnx import export_model
from .exporters.parity import check_enough_images
from .exporters.precision import export_precisions, reduced_path
from .exporters.types import OnnxArtifact
from .introspect.fingerprint import models_hash
from .job import (
    Compressed,
    Compression,
    Cut,
    Judged,
    LowerPrecisions,
    Planned,
    Pruned,
    Recovered,
    cut_names,
    onnx_name,
    pruned_file,
    recovered_file,
    reopen,
    stage_titles,
)
from .machine.device import choose_device
from .models import artifact, user_file
from .models.artifact import Model
from .outcome import benchmark, report
from .preflight import Preflight, preflight
from .recipe import Recipe, TrainSettings
from .report.rows import DENSE, PRUNED, SCRATCH, model_rows
from .report.terminal import show_end
from .runs.cache import writers
from .runs.files import digest
from .runs.run import Run, RunInputs
from .serialization import to_json
from .structure.paths import sample_images
from .surgery.apply import apply
from .surgery.repair import repair
from .training.trainer import train
from .training.types import TrainResult

FILES = {
    "report.html": "the run in one page",
    "model.onnx": "the pruned model for ONNX Runtime",
    "model.safetensors": "the pruned model for PyTorch and for other commands",
}


@working("Compressing")
def compress(job: Compression) -> Compressed | None:
    """Run all stages of a compression, or those that an interrupted run has not completed.

    In a distributed run the first process returns the result. The others return None when no shared work is left, so
    that latency is measured on an otherwise idle machine.

    Raises:
        UsageError: the folder contains a run with other inputs, or a setting does not fit the model, data or machine.
        QualityGateError: the pruned model or an exported file differs from its reference, or training diverged.
        EnvironmentProblem: the machine lacks a package, a device or disk space.
    """
    check_section(job.recipe.bench)
    check_enough_images(job.data.train, job.data.name)
    choose_device(job.recipe.device)
    with open_run(job) as run:
        judged = judge(job, run)
        if not distributed.leave_group():
            return None
        table = benchmark(run, judged.rows, job.recipe)
        made = report(job, run, judged, table)
        show_end(made, run, FILES)
        return Compressed(made, run.folder)


def judge(job: Compression, run: Run) -> Judged:
    """Run the stages of a compression up to the evaluation; the processes of a distributed run share this work.

    Raises:
        UsageError, QualityGateError, EnvironmentProblem: as `compress`.
    """
    found = recover(job, run)
    models, notes = {DENSE: job.dense.module.cpu().eval(), PRUNED: found.model.cpu().eval()}, list(found.notes)
    if job.recipe.baseline.kind == "scratch":
        models[SCRATCH], note = train_from_scratch(job, run, found.model, found.cuts)
        notes.append(note)
    files = {DENSE: found.dense}
    files |= {label: export(job, run, label, model) for label, model in models.items() if label != DENSE}
    cards = {label: evaluate_on_test(job, run, label, model, files[label]) for label, model in models.items()}
    rows = [row for label in models for row in model_rows(label, cards[label], files[label])]
    return Judged(found.cuts, models, tuple(rows), tuple(notes))


def recover(job: Compression, run: Run) -> Recovered:
    """Run the stages of a compression up to the last fine-tuning.

    Raises:
        UsageError, QualityGateError, EnvironmentProblem: as `compress`.
    """
    dense = job.dense.module
    with run.refusable(run.folder / f"{DENSE}.onnx"):
        notes = [*job.notes, *try_out(job, run)]
        exported = export(job, run, DENSE, dense)
    notes.append(look_at_dense(job, run))
    model: nn.Module = dense
    cuts: list[Cut] = []
    for at in cut_names(job.recipe.pruning.cuts):
        planned = analyse_and_plan(job, run, at, model, cuts)
        pruned = prune_and_repair(job, run, at, model, planned.plan)
        tuned = finetune(job, run, at, planned.plan)
        model = reopen(job, recovered_file(run, at))
        cuts.append(Cut(planned, pruned, tuned, what_was_cut(planned.plan, pruned, job, model)))
    return Recovered(tuple(cuts), model, exported, tuple(notes))


def plan_only(job: Compression) -> PruningPlan:
    """Measure sensitivity and print and return the plan of the (first) cut; no run folder is written.

    The model is tried as in `compress`, also by an export.

    Raises:
        UsageError: the model is refused, or a setting does not fit.
    """
    check_enough_images(job.data.train, job.data.name)
    choose_device(job.recipe.device)
    title, reuse = stage_titles(job.recipe)["preflight"], job.reuse("preflight", _share_of_batch(job))
    for note in job.cache.value(title, Preflight, reuse, partial(_tried, job)).notes:
        warn(note)
    _try_export(job)
    plan = next_cut(job, job.dense.module, ()).plan
    say_plan(plan)
    return plan


def _try_export(job: Compression) -> None:
    """Export the dense model, unless a stored export shows that it can be; a run finds the file in the cache."""
    dense, recipe, name = job.dense, job.recipe, f"export-{DENSE}"
    title, reuse = stage_titles(recipe)[name], job.reuse(name)
    if job.cache.find(title, reuse) is not None:
        return
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        path = Path(folder) / onnx_name(DENSE)
        made = export_model(dense.module, dense.spec, job.data.train, path, recipe.export, recipe.seed)
        job.cache.store(title, reuse, to_json(made), time.monotonic() - begin, writers([path]))


def open_run(job: Compression, without: Collection[str] = ()) -> Run:
    """Claim the run folder.

    Args:
        job: the compression.
        without: stages that another run makes for this one.

    Raises:
        UsageError: the folder belongs to a run with other inputs, or is a file.
        EnvironmentProblem: the folder cannot be written.
    """
    recipe, section = job.recipe, job.recipe.pruning
    inputs = RunInputs.of(*job.identity, recipe.model_dump(mode="json"), job.code)
    folder = job.out or Path("runs") / f"{job.name}-{section.metric}-{100 * section.ratio:.0f}-{inputs.key[:6]}"
    check = partial(user_file.check_unchanged, job.functions, job.code)
    titles = {name: title for name, title in stage_titles(recipe).items() if name not in without}
    return Run.open(folder, inputs, recipe, job.command, titles, check, job.cache)


def look_at_dense(job: Compression, run: Run) -> str:
    """Run the stage that attacks the dense model for seconds, print its figures, and return a warning or nothing."""
    dense, data, recipe = job.dense, job.data, job.recipe

    def make() -> DenseCheck:
        return check_dense(
            dense.module, data.validation, data.train, data.num_classes, recipe.threat_model, recipe.seed, job.device
        )

    found = run.stage("dense", DenseCheck, [], make, reuse=job.reuse("dense"))
    console.print(found.line(), markup=False)
    warn(found.note())
    return found.note()


def try_out(job: Compression, run: Run) -> tuple[str, ...]:
    """Run the stage that tries the dense model on a few images; print and return what it found."""
    reuse = job.reuse("preflight", _share_of_batch(job))
    notes = run.stage("preflight", Preflight, [], partial(_tried, job), reuse=reuse).notes
    for note in notes:
        warn(note)
    return notes


def _tried(job: Compression) -> Preflight:
    dense, batch = job.dense, _share_of_batch(job)
    return preflight(dense.module, job.data.train, dense.spec.num_classes, job.recipe.seed, batch_size=batch)


def _share_of_batch(job: Compression) -> int:
    """Return the number of images of a training batch that each process has."""
    return max(1, job.recipe.finetune.batch_size // distributed.count())


def analyse_and_plan(job: Compression, run: Run, at: str, model: nn.Module, before: Sequence[Cut]) -> Planned:
    """Run the stage that analyses the model and plans the next cut, and print the plan.

    Args:
        job: the compression.
        run: its run folder.
        at: suffix of the cut's stage names.
        model: the model to cut.
        before: previous cuts.
    """
    planned = run.stage(f"plan{at}", Planned, [models_hash(model)], partial(next_cut, job, model, before))
    say_plan(planned.plan)
    return planned


def measured(job: Compression, model: nn.Module) -> Measured:
    """Return the measurements of a model that is cut, on training images."""
    return Measured(model, job.dense.spec, job.data.train, job.recipe, job.device, job.cache)


def next_cut(job: Compression, model: nn.Module, before: Sequence[Cut]) -> Planned:
    """Analyse the current model and plan the next cut."""
    recipe, section = job.recipe, job.recipe.pruning
    plans = [cut.plan for cut in before]
    analysis = analyse(measured(job, model), dense_widths(plans))
    assert analysis.profile is not None
    if section.metric == "latency":
        wanted = (1 - section.ratio) ** ((len(plans) + 1) / section.cuts)
        return Planned(analysis.profile, plan_by_clock(job.dense, job.data.train, recipe, model, analysis, wanted))
    ratio = remaining_ratio(plans, section.ratio, section.metric, section.cuts)
    return Planned(analysis.profile, make_plan(analysis, section.model_copy(update={"ratio": ratio})))


def plan_by_clock(
    dense: Model, images: ImageSet, recipe: Recipe, model: nn.Module, analysis: Analysis, wanted: float
) -> PruningPlan:
    """Return the plan whose measured latency is nearest to `wanted`, in (0, 1), times that of the dense model.

    Args:
        dense: the dense model.
        images: training images, for the parity check of the files that are timed.
        recipe: recipe with the sections ``pruning``, ``bench`` and ``export``.
        model: the model that is cut: the dense one, or the result of earlier cuts.
        analysis: analysis of `model`.
        wanted: wanted latency divided by that of the dense model.
    """
    seen = sample_images(images, recipe.seed)
    with CandidateClock.open(dense.module, dense.spec, images, recipe) as clock:

        def measure(plan: PruningPlan) -> float:
            return clock.kept(apply(model.cpu(), plan, dense.spec.blank_image(), seen).model)

        present = 1.0 if model is dense.module else clock.kept(model)
        return plan_for_latency(
            clock.priced(analysis, model), recipe.pruning, wanted, present, measure, conditions(recipe.bench)
        )


def prune_and_repair(job: Compression, run: Run, at: str, parent: nn.Module, plan: PruningPlan) -> Pruned:
    """Run the stage that removes channels, repairs the model and writes it to a file."""
    recipe, spec, file = job.recipe, job.dense.spec, pruned_file(run, at)

    def make() -> Pruned:
        with working("Cutting channels and proving every group against the masked dense model"):
            surgery = apply(parent.cpu(), plan, spec.blank_image(), sample_images(job.data.train, recipe.seed))
        attacked = None
        if recipe.pruning.repair == "least_squares":
            attacked = measured(job, parent).attacked(min(recipe.pruning.repair_images, len(job.data.train)))
        repair(surgery, parent, job.data.train, recipe, job.device, attacked)
        save(job, surgery.model, file)
        return Pruned(surgery.rolled_back, surgery.parity)

    pruned = run.stage(f"prune{at}", Pruned, [to_json(plan)], make, files=[file])
    for group in pruned.rolled_back:
        warn(f"group {group.name} stayed whole: {group.reason}")
    return pruned


def finetune(job: Compression, run: Run, at: str, plan: PruningPlan) -> TrainResult:
    """Run the stage that fine-tunes the repaired model; the result is written to a file."""
    recipe, data, file = job.recipe, job.data, recovered_file(run, at)
    settings: TrainSettings = recipe.finetune
    if at:
        settings = settings.model_copy(update={"epochs": recipe.pruning.epochs_between})

    def make() -> TrainResult:
        model = reopen(job, pruned_file(run, at))
        result = train(
            model, data.train, data.validation, recipe.threat_model, settings,
            seed=recipe.seed, device=job.device, checkpoint=run.folder / f"finetune{at}" / "checkpoint.pt",
            teacher=job.dense.module,
        )  # fmt: skip
        save(job, model, file)
        return result

    tuned = run.stage(f"finetune{at}", TrainResult, [to_json(plan)], make, files=[file], shared=True)
    warn(tuned.note)
    return tuned


def save(job: Compression, model: nn.Module, file: Path) -> None:
    """Write a model of this run with its provenance."""
    provenance = {
        "command": job.command, "parent": models_hash(job.dense.module), "recipe": digest(job.recipe.model_dump()),
    }  # fmt: skip
    artifact.save(file, model.cpu(), job.dense.spec, threat=job.recipe.threat_model, provenance=provenance)


def what_was_cut(plan: PruningPlan, pruned: Pruned, job: Compression, model: nn.Module) -> PruningPlan:
    """Return the plan as carried out: without rolled-back groups, and with the costs of the pruned model."""
    whole = {group.name for group in pruned.rolled_back}
    return realised(plan, whole, count_macs(model, job.dense.spec.blank_image()), count_params(model))


def export(job: Compression, run: Run, label: str, model: nn.Module) -> dict[str, OnnxArtifact]:
    """Run the stages that export a model; return its files by precision (below fp32 for the pruned model only)."""
    path = run.folder / onnx_name(label)
    section, identity, spec = job.recipe.export, models_hash(model), job.dense.spec

    def make() -> OnnxArtifact:
        return export_model(model, spec, job.data.train, path, section, job.recipe.seed)

    # The folder may have been moved since the files were written, so paths are set anew.
    name = f"export-{label}"
    reuse = job.reuse(name) if label == DENSE else None
    stored = run.stage(name, OnnxArtifact, [identity], make, files=[path], reuse=reuse)
    files = {"fp32": replace(stored, path=str(path))}
    if label != PRUNED or not section.precisions:
        return files

    def reduce() -> LowerPrecisions:
        made = export_precisions(model, job.data.train, path, section)
        return LowerPrecisions({str(precision): file for precision, file in made.items()})

    paths = {precision: reduced_path(path, precision) for precision in section.precisions}
    given = [identity, files["fp32"].sha256]
    lower = run.stage(f"export-{label}-reduced", LowerPrecisions, given, reduce, files=[*paths.values()])
    return files | {precision: replace(lower.files[precision], path=str(paths[precision])) for precision in paths}


def evaluate_on_test(
    job: Compression, run: Run, label: str, model: nn.Module, files: Mapping[str, OnnxArtifact]
) -> ResultCard:
    """Run the stage that measures clean and robust accuracy of a model and its files on test images."""
    recipe, data, name = job.recipe, job.data, f"evaluate-{label}"

    def make() -> ResultCard:
        card = evaluate(
            model.to(job.device), stratified(data.test, recipe.evaluation.images), recipe.threat_model,
            recipe.evaluation, subject=Subject(label, data.name, "test"), seed=recipe.seed,
            exported={precision: OnnxModel(Path(file.path)) for precision, file in files.items()},
            state_path=run.folder / name / "state.npz", shared=True,
        )  # fmt: skip
        return replace(card, macs=count_macs(model.cpu(), job.dense.spec.blank_image()), params=count_params(model))

    hashes = [file.sha256 for file in files.values()]
    return run.stage(
        name, ResultCard, [models_hash(model), hashes], make, files=[run.folder / name / "state.npz"], shared=True,
        reuse=job.reuse(name, files=hashes) if label == DENSE else None,
    )  # fmt: skip


def say_plan(plan: PruningPlan) -> None:
    """Print a plan, with its note below."""
    console.print(render_plan(plan))
