"""A compression and a training whose stages only note what they are given, and answer with what was prepared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from builders.plans import analysed
from builders.report_sample import artifact as onnx_artifact
from builders.report_sample import card, epoch, latency
from builders.training_sample import make_images
from robust_prune import baseline, compression, goal, job, outcome, ratios, recipe_reader
from robust_prune import train as training
from robust_prune.attacks import ThreatModel
from robust_prune.bench.types import LatencyTable
from robust_prune.budget import analysis, measured
from robust_prune.budget.plan import make_plan
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.data import sources
from robust_prune.data.base import DataBundle
from robust_prune.evaluation.card import Accuracy, ExportedAccuracy, ResultCard
from robust_prune.evaluation.dense_check import DenseCheck
from robust_prune.exporters.types import OnnxArtifact
from robust_prune.introspect.fingerprint import images_hash, models_hash
from robust_prune.models import artifact, foreign, registry
from robust_prune.models.artifact import Model
from robust_prune.recipe import PruningSection, Recipe
from robust_prune.report import RunReport
from robust_prune.runs.cache import Cache
from robust_prune.runs.parts import Parts
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.surgery import repair as repairing
from robust_prune.surgery.apply import apply
from robust_prune.training.types import TrainResult

ARCH = "cifar/resnet20_x0.25"


class Reached(Exception):
    """All that was to be seen has been seen."""


@dataclass
class Recorder:
    """Notes what each stage is first called with, by the stage's name; the run ends once all of `until` were called."""

    until: frozenset[str] = frozenset()
    first: dict[str, Any] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    report: RunReport | None = None

    def stage(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        """A function that notes what it is called with, and answers."""

        def noted(*arguments: Any, **keywords: Any) -> Any:
            label = name
            if name == "adversarial set" and "surgery" in self.called:
                label = "attacked images of the repair"
            # What is saved names its whole recipe by a hash, which every value reaches.
            seen = keywords.get("threat") if name == "artifact" else [arguments, keywords]
            self.first.setdefault(label, note(seen))
            self.called.append(label)
            if self.until and self.until <= self.first.keys():
                raise Reached
            return answer(*arguments, **keywords)

        return noted

    def keep(self, report: RunReport, *_: Any) -> None:
        """Keeps the report in place of writing it."""
        self.report = report


def note(value: Any) -> Any:
    """`value` in a form that can be compared: models, images and tensors by their contents.

    A whole recipe is left out: what takes it is no stage, and would be said to be reached by everything.
    """
    if isinstance(value, Recipe):
        return "a recipe"
    if isinstance(value, Parts):
        return "parts"  # where results are stored is no setting
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, nn.Module):
        return models_hash(value)
    if isinstance(value, Tensor):
        return [tuple(value.shape), value.double().sum().item()]
    if hasattr(value, "get") and hasattr(value, "__len__") and not isinstance(value, Mapping):
        return images_hash(value)
    if isinstance(value, Mapping):
        return {str(key): note(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [note(item) for item in value]
    if isinstance(value, Path):
        return value.name if value.is_absolute() else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: note(getattr(value, f.name)) for f in fields(value)}
    return value if isinstance(value, int | float | str | bool | None) else type(value).__name__


class Prepared:
    """What the stages answer: made once, small, and of one piece."""

    @cached_property
    def bundle(self) -> DataBundle:
        part = make_images(90)
        return DataBundle(
            "toy", part, make_images(30, 1), make_images(24, 2), ("a", "b", "c"), (0.5,) * 3, (0.2,) * 3, (3, 8, 8)
        )

    @cached_property
    def dense(self) -> Model:
        spec = registry.make_spec(ARCH, num_classes=3, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)
        torch.manual_seed(0)
        return Model(registry.build(spec).eval(), spec)

    @cached_property
    def analysis(self) -> analysis.Analysis:
        return analysed(self.dense.module, self.dense.spec.blank_image(), [0.5, 1.0, 0.2])

    @cached_property
    def adv(self) -> AdversarialSet:
        x, y = self.bundle.train.get(torch.arange(8))
        return AdversarialSet(x.float() / 255, y, ThreatModel(), 0)

    @cached_property
    def plan(self) -> Any:
        return make_plan(self.analysis, PruningSection())

    @cached_property
    def surgery(self) -> Any:
        return apply(self.dense.module, self.plan, self.dense.spec.blank_image())

    def reopened(self) -> nn.Module:
        """The dense model once more."""
        model = registry.build(self.dense.spec).eval()
        model.load_state_dict(self.dense.module.state_dict())
        return model


PREPARED = Prepared()


def _stages() -> list[tuple[Any, str, str, Callable[..., Any]]]:
    """Where each function that does a stage's work is looked up, its name there, ours, and what it answers."""
    given, small = PREPARED, PREPARED.surgery.model

    def evaluated(*_: Any, subject: Any, exported: Any = None, state_path: Any = None, **__: Any) -> ResultCard:
        if state_path is not None:
            state_path.parent.mkdir(parents=True, exist_ok=True)
            state_path.write_bytes(b"state")
        found = card(subject.model, 20, 10, 24)
        right = ExportedAccuracy(found.clean, found.robust)
        return replace(found, split=subject.split, exported=dict.fromkeys(exported or {}, right))

    def exported(*arguments: Any) -> OnnxArtifact:
        path = Path(arguments[3])
        path.write_bytes(b"onnx")
        return replace(onnx_artifact(path.stem, 4), path=str(path))

    def reduced(model: nn.Module, images: Any, source: Path, section: Any) -> dict[str, OnnxArtifact]:
        return {precision: onnx_artifact(precision, 2) for precision in section.precisions}

    def timed(files: Any, *_: Any) -> LatencyTable:
        return LatencyTable(tuple(latency(label, 1, 2.0, None) for label, _ in files), {}, {}, "")

    def checked(*arguments: Any) -> DenseCheck:
        return DenseCheck("held-out", Accuracy(18, 20), Accuracy(9, 20), 0.3, 3, arguments[4])

    @contextlib.contextmanager
    def clock(*_: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(priced=lambda analysis, _: analysis)

    clean = given.adv.images, given.adv.labels
    tuned = TrainResult((epoch(1, 1.0),), 1)
    return [
        (sources, "load_data", "data", lambda *_, **__: given.bundle),
        (foreign, "open_model", "model", lambda *_, **__: given.dense),
        (registry, "make_spec", "architecture", registry.make_spec),
        (job, "choose_device", "device", lambda _: "cpu"),
        (compression, "choose_device", "device", lambda _: "cpu"),
        (ratios, "choose_device", "device of the frontier", lambda _: "cpu"),
        (ratios, "check_section", "provider of the frontier", lambda *_: None),
        (goal, "choose_device", "device of the search", lambda _: "cpu"),
        (goal, "check_section", "provider of the search", lambda *_: None),
        (measured, "find_groups", "groups", lambda *_: given.analysis.search),
        (analysis, "cost_model", "cost", lambda *_: given.analysis.cost),
        (measured, "make_adversarial_set", "adversarial set", lambda *_, **__: given.adv),
        (measured, "measure", "sensitivity", lambda *_, **__: given.analysis.profile),
        (measured, "aggregate_groups", "sensitivity of groups", lambda profile, *_: profile),
        (measured, "random_images", "clean images", lambda *_: clean),
        (measured, "channel_scores", "channel scores", lambda *_, **__: given.analysis.scores),
        (compression, "check_dense", "check of the dense model", checked),
        (compression, "make_plan", "plan", lambda *_: given.plan),
        (compression, "plan_for_latency", "plan for a latency", lambda *_: given.plan),
        (compression.CandidateClock, "open", "candidate clock", clock),
        (compression, "apply", "surgery", lambda *_: given.surgery),
        (repairing, "reestimate_batchnorm", "batch-norm repair", lambda *_, **__: 0),
        (repairing, "random_images", "clean images of the repair", lambda *_: clean),
        (repairing, "reconstruct", "least-squares repair", lambda *_, **__: ()),
        (compression, "evaluate", "evaluation", evaluated),
        (compression, "train", "fine-tuning", lambda *_, **__: tuned),
        (baseline, "train", "training from scratch", lambda *_, **__: tuned),
        (baseline, "affordable", "length from scratch", lambda *_, **__: (2, 64)),
        (baseline, "fresh_like", "fresh weights", lambda *_: small),
        (baseline, "random_subset", "images from scratch", lambda images, *_: images),
        (compression, "export_model", "export", exported),
        (compression, "export_precisions", "lower precisions", reduced),
        (compression, "OnnxModel", "exported file", lambda path: path.name),
        (compression, "check_section", "check of the provider", lambda *_: None),
        (outcome, "run_section", "latency", timed),
        (outcome, "make_examples", "examples", lambda *_, **__: []),
        (artifact, "save", "artifact", artifact.save),
        (training, "check_export", "trial export", lambda *_: None),
        (training, "train", "training", lambda *_, **__: tuned),
        (training, "evaluate", "evaluation of what was trained", evaluated),
        (training, "choose_device", "device of training", lambda _: "cpu"),
    ]


def recorded(
    command: str,
    values: Mapping[str, Any],
    folder: Path,
    until: Collection[str] = (),
    answers: Mapping[str, Callable[..., Any]] | None = None,
    cache: Cache | None = None,
) -> Recorder:
    """What the stages of ``compress`` or ``train`` are called with under a recipe of `values`.

    Args:
        command: ``compress`` or ``train``.
        values: dotted values of the recipe.
        folder: of the run.
        until: stages; the run ends as soon as all of them have been called.
        answers: by stage, what it answers in place of what was prepared.
        cache: results that runs share; by default none.
    """
    with contextlib.suppress(Reached), patched(answers, until) as recorder:
        recipe = recipe_reader.load(None, {"data.name": "toy", "model.arch": ARCH} | dict(values))
        bundle = open_data(recipe)
        if command == "train":
            training.train_model("toy", bundle, recipe, folder, "command")
        else:
            model = open_model_for("toy.pt", bundle, recipe, None)
            compression.compress(job.Compression("toy", model, bundle, recipe, folder, "command", cache or Cache()))
    return recorder


@contextlib.contextmanager
def patched(answers: Mapping[str, Callable[..., Any]] | None = None, until: Collection[str] = ()) -> Iterator[Recorder]:
    """Replace the stages by recorders inside the block; see `recorded`."""
    recorder, given = Recorder(frozenset(until)), answers or {}
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, stage, answer in _stages():
            patch.setattr(owner, name, recorder.stage(stage, given.get(stage, answer)))
        for owner in (outcome, ratios, training):
            patch.setattr(owner, "snapshot", dict)
            patch.setattr(owner, "write", given.get("write", recorder.keep))
        yield recorder
