"""Adversarial training from scratch, evaluation on test images, and a report."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import distributed
from .budget.counting import count_macs, count_params
from .console import warn, working
from .data.base import DataBundle, stratified
from .errors import RobustPruneError, UsageError
from .evaluation.card import ResultCard
from .evaluation.evaluate import Subject, evaluate
from .exporters.onnx import check_export
from .exporters.parity import check_enough_images
from .introspect.fingerprint import images_hash, models_hash
from .introspect.obstacles import check_layers
from .machine.device import choose_device
from .machine.snapshot import snapshot
from .models import artifact, bounded, registry, user_file
from .models.normalization import AUTO, NormalizedClassifier, no_normalization, parse
from .models.normalization_choice import normalizes_inside
from .models.published import configured
from .models.spec import ModelSpec
from .preflight import Preflight, preflight
from .recipe import Recipe
from .report.files import NAMES, write
from .report.rows import TRAINED
from .report.terminal import show_end
from .report.types import ModelRow, RunReport
from .runs.files import digest
from .runs.run import Run, RunInputs
from .serialization import to_json
from .training.trainer import train
from .training.types import TrainResult

STAGES = {
    "preflight": "Trial of the model on a few images",
    "train": "Training",
    "evaluate": "Evaluation on test images",
    "report": "Report",
}
FILES = {
    "report.html": "the run in one page",
    "model.safetensors": "the trained model, which the other commands take",
}
_SECTIONS = {"seed", "data", "threat", "model", "training", "evaluation"}
"""Sections of a recipe on which training depends."""


@working("Training a model")
def train_model(name: str, data: DataBundle, recipe: Recipe, folder: Path, command: str) -> RunReport | None:
    """Train and evaluate a model and write the report; an interrupted run is resumed.

    In a distributed run only the first process returns the report; the others return None.

    Args:
        name: name of the model in tables.
        data: data set.
        recipe: recipe with architecture, threat model and the sections ``training`` and ``evaluation``.
        folder: run folder.
        command: command line that reproduces the run.

    Raises:
        UsageError: the architecture is missing or unknown, or the folder contains another run.
        QualityGateError: training diverged, or an attack returned a point outside the threat model.
        EnvironmentProblem: the machine lacks a package, a device or disk space.
    """
    torch.manual_seed(recipe.seed)
    spec, model = _built(data, recipe)
    images = [images_hash(part) for part in (data.train, data.validation, data.test)]
    functions = (recipe.training.loss, recipe.evaluation.tier)
    versions = user_file.versions(*functions)
    inputs = RunInputs.of(to_json(spec), images, _settings(recipe), versions)
    check = partial(user_file.check_unchanged, functions, versions)
    with Run.open(folder, inputs, recipe, command, STAGES, check) as run:
        return _run_stages(name, spec, model, data, recipe, run)


# Six parameters: what `train_model` was given and what it has built.
def _run_stages(
    name: str, spec: ModelSpec, model: NormalizedClassifier, data: DataBundle, recipe: Recipe, run: Run
) -> RunReport | None:
    folder, command, final = run.folder, run.command, run.folder / "model.safetensors"
    with run.refusable():
        notes = run.stage("preflight", Preflight, [], partial(_try_out, model, spec, data, recipe)).notes
    for note in notes:
        warn(note)

    def fit() -> TrainResult:
        result = train(
            model, data.train, data.validation, recipe.threat_model, recipe.training,
            seed=recipe.seed, device=choose_device(recipe.device), checkpoint=folder / "train" / "checkpoint.pt",
        )  # fmt: skip
        provenance = {"command": command, "recipe": digest(_settings(recipe))}
        plain = registry.without_pretrained(spec)
        artifact.save(final, model.cpu(), plain, threat=recipe.threat_model, provenance=provenance)
        return result

    trained = run.stage("train", TrainResult, [], fit, files=[final], shared=True)
    best = artifact.load(final, known=spec).module
    judge = partial(_evaluate, name, best, spec, data, recipe, folder)
    card = run.stage(
        "evaluate", ResultCard, [models_hash(best)], judge, files=[folder / "evaluate" / "state.npz"], shared=True
    )
    if not distributed.leave_group():
        return None
    rows = (ModelRow(TRAINED, card.macs or 0, card.params or 0, card=card),)

    def write_report() -> RunReport:
        made = RunReport(
            title=f"{name}: adversarial training ({recipe.training.loss})",
            command=command,
            recipe=recipe.model_dump(mode="json"),
            notes=tuple(note for note in (*data.cautions, *notes, trained.note) if note),
            models=rows,
            history=trained.history,
            start=trained.start,
            environment=snapshot(),
            seconds=dict(run.seconds),
            class_names=tuple(data.class_names),
        )
        write(made, folder)
        return made

    report = run.stage("report", RunReport, to_json(rows), write_report, files=[folder / file for file in NAMES])
    show_end(report, run, FILES)
    return report


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include=_SECTIONS)


def _built(data: DataBundle, recipe: Recipe) -> tuple[ModelSpec, NormalizedClassifier]:
    spec = _spec(data, recipe)
    bounded.check_buildable(spec)
    model = registry.build(spec)
    if recipe.model.normalization != AUTO or not normalizes_inside(model.backbone, data.input_size[0]):
        return spec, model
    none = no_normalization(data.input_size[0])
    warn("the network normalizes the images itself, so nothing is put before it; --normalization data would do so.")
    return replace(spec, mean=none.mean, std=none.std), NormalizedClassifier(model.backbone, none.mean, none.std)


def _try_out(model: nn.Module, spec: ModelSpec, data: DataBundle, recipe: Recipe) -> Preflight:
    """Try the model; what only a later compression would refuse becomes a note."""
    batch = max(1, recipe.training.batch_size // distributed.count())
    found = preflight(model, data.train, spec.num_classes, recipe.seed, batch_size=batch, cut=False)
    try:
        check_layers(model)
        check_enough_images(data.train, data.name)
        check_export(model, spec, data.train, recipe.export, recipe.seed)
    except RobustPruneError as error:
        return Preflight((*found.notes, f"The trained model will not be compressible or exportable as it is: {error}"))
    return found


def _spec(data: DataBundle, recipe: Recipe) -> ModelSpec:
    if recipe.model.arch is None:
        raise UsageError("the recipe names no architecture. Set model.arch.")
    given = parse(recipe.model.normalization, data)
    spec = registry.make_spec(
        recipe.model.arch,
        num_classes=data.num_classes,
        input_size=data.input_size,
        mean=given.mean if given else data.mean,
        std=given.std if given else data.std,
        kwargs=recipe.model.kwargs,
        class_names=data.class_names,
    )
    # Published weights are tuned further with the normalization that they were made with.
    known = configured(spec) if given is None and recipe.model.kwargs.get("pretrained") else None
    return spec if known is None else replace(spec, mean=known.mean, std=known.std)


def _evaluate(
    name: str, model: nn.Module, spec: ModelSpec, data: DataBundle, recipe: Recipe, folder: Path
) -> ResultCard:
    card = evaluate(
        model.to(choose_device(recipe.device)), stratified(data.test, recipe.evaluation.images), recipe.threat_model,
        recipe.evaluation, subject=Subject(name, data.name, "test"), seed=recipe.seed,
        state_path=folder / "evaluate" / "state.npz", shared=True,
    )  # fmt: skip
    return replace(card, macs=count_macs(model.cpu(), spec.blank_image()), params=count_params(model))
