"""Every value of a section changes what the stage does that the section is handed to.

`test_recipe_reaches_stages.py` shows that sections come to their stages; here the stages run, on something small, and
what they do is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.branch_models import Residuals, images
from builders.evaluation_sample import THREAT, Tiny, generated, train_tiny
from builders.plans import analysed
from builders.surgery_models import Residual, example
from builders.training_sample import make_images, make_model, make_settings
from builders.weights import randomised

from robust_prune.bench import latency
from robust_prune.budget.cost import cost_model
from robust_prune.budget.cut_losses import CutLoss
from robust_prune.budget.plan import make_plan
from robust_prune.data.base import ImageSet
from robust_prune.evaluation.evaluate import evaluate
from robust_prune.exporters import onnx, precision
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.recipe import (
    BenchSection,
    EvaluationSection,
    ExportSection,
    FinetuneSettings,
    PruningSection,
    Section,
    SensitivitySection,
    TrainSettings,
)  # fmt: skip
from robust_prune.sensitivity.adversarial_set import make_adversarial_set
from robust_prune.sensitivity.estimators import measure
from robust_prune.serialization import to_json
from robust_prune.structure.branches import find_branch
from robust_prune.structure.groups import find_groups
from robust_prune.training import acceleration, trainer
from robust_prune.training.trainer import train

Effect = Callable[[Any], Any]


def sensitivity(section: SensitivitySection) -> Any:
    model = randomised(Residual())
    adv = make_adversarial_set(model, generated(40), THREAT, section)
    profile = measure(model, adv, section, groups=find_groups(model, example()).groups)
    return [len(adv), adv.images.sum().item(), to_json(profile)]


@cache
def planned_for() -> Any:
    torch.manual_seed(0)
    return analysed(torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 48, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(48, 5),
    ), example(), [0.02, 3.0, 0.3])  # fmt: skip


@cache
def planned_by_cuts() -> Any:
    """An analysis in which branches cost little and channels cost much."""
    model = randomised(Residuals()).eval()
    groups = find_groups(model, images()[:1]).groups
    branches = {group.name: found for group in groups if (found := find_branch(model, group, images()))}
    losses = {g.name: tuple(CutLoss(k, 1 / k if k else 1e-3, 1e-4) for k in (0, 1, 3, 5)) for g in groups}
    cost = cost_model(model, images()[:1], groups, branches)
    return replace(analysed(model, images()[:1]), cost=cost, cut_losses=losses, branches=branches)


def pruning(section: PruningSection) -> Any:
    return to_json(make_plan(planned_by_cuts() if section.allocation == "cuts" else planned_for(), section))


def training(settings: TrainSettings) -> Any:
    """The weights and figures of a training, what was scored, and what accelerate, compiler and readers were asked."""
    asked: list[Any] = []
    front, score, read = acceleration.Accelerator, trainer.score, trainer.reading

    def accelerator(**keywords: Any) -> Any:
        asked.append(keywords["log_with"])
        return front(cpu=True)

    def scored(model: torch.nn.Module, images: ImageSet, *arguments: Any, **keywords: Any) -> Any:
        asked.append((models_hash(model), len(images), keywords["steps"]))
        return score(model, images, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceleration, "Accelerator", accelerator)
        patch.setattr(acceleration, "get_available_trackers", lambda: ["tensorboard"])
        patch.setattr(trainer, "score", scored)
        patch.setattr(trainer, "reading", lambda *given: asked.append(given[3]) or read(*given))
        patch.setattr(trainer, "choose_precision", lambda *_: asked.append("timed") or trainer.Precision(False, False))
        patch.setattr(trainer.compilation, "pays", lambda *_, **__: asked.append("compiled"))
        model = make_model()
        result = train(model, make_images(48), make_images(30, 1), THREAT, settings, teacher=make_model(3))
    return [models_hash(model), [(r.epoch, r.train_loss, r.lr) for r in result.history], asked]


@cache
def judged() -> Tiny:
    return train_tiny()


def evaluation(section: EvaluationSection) -> Any:
    batches: list[int] = []
    hook = judged().register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    try:
        card = evaluate(judged(), generated(30, seed=1), THREAT, section)
    finally:
        hook.remove()
    return [{**to_json(card), "seconds": 0}, batches]


def export(section: ExportSection) -> Any:
    """What the writers of files are asked for."""
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "export_onnx", lambda *_, **keywords: asked.append(keywords["opset"]))
        patch.setattr(precision, "export_reduced", lambda *args: asked.append((args[1].name, len(args[-1]))))
        spec: Any = SimpleNamespace(class_names=())
        patch.setattr(onnx, "to_json", lambda _: {})
        onnx.export_model(make_model(), spec, make_images(40), "m.onnx", section, 0)
        precision.export_precisions(make_model(), make_images(40), Path("m.onnx"), section)
    return asked


def bench(section: BenchSection) -> Any:
    """The conditions of the measurement, and how long all of it may take."""
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "run", lambda _, **conditions: asked.append(conditions))
        latency.run_section([], section, 0)
    return asked


QUICK = {"sensitivity": {"images": 24, "steps": 2}, "evaluation": {"steps": 2, "restarts": 1, "precision": "fp32"}}
SECTIONS: dict[str, tuple[type[Section], Effect]] = {
    "sensitivity": (SensitivitySection, sensitivity),
    "pruning": (PruningSection, pruning),
    "training": (TrainSettings, training),
    "finetune": (FinetuneSettings, training),
    "evaluation": (EvaluationSection, evaluation),
    "export": (ExportSection, export),
    "bench": (BenchSection, bench),
}
"""What is handed over whole. Values of the other sections are handed over one by one."""

READ_BY_THE_JOB = {
    "pruning.cuts", "pruning.epochs_between", "pruning.repair", "pruning.repair_images",
    "evaluation.images",
}  # fmt: skip
"""Values that the job itself takes out of a section: `test_recipe_reaches_stages.py` has them."""

TRAIN_CASES: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "loss": ("trades", {}), "epochs": (1, {}), "batch_size": (24, {}), "lr": (0.05, {}), "warmup": (0.5, {}),
    "momentum": (0.5, {}), "weight_decay": (0.1, {}), "steps": (1, {"loss": "pgd_at"}),
    "beta": (1.0, {"loss": "trades"}), "distillation": (0.5, {}), "temperature": (3.0, {"distillation": 0.5}),
    "awp": (0.05, {}), "awp_warmup": (0.8, {"awp": 0.05}), "label_smoothing": (0.3, {}),
    "ema_decay": (0.0, {}), "clip_grad": (0.01, {}), "crop_padding": (3, {}), "flip": (False, {}),
    "resized_crop": (0.3, {}),
    "validation_images": (10, {}), "validation_steps": (6, {}), "precision": ("fp32", {}), "compile": ("on", {}),
    "workers": (3, {}), "trackers": (("tensorboard",), {}),
}  # fmt: skip
CASES: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "sensitivity.estimator": ("gradient", {}),
    "sensitivity.images": (17, {}),
    "sensitivity.steps": (3, {}),
    "sensitivity.rho": (0.2, {}),
    "sensitivity.ascent_steps": (1, {"estimator": "ascent", "rho": 0.2}),
    "sensitivity.aggregation": ("max", {}),
    "pruning.ratio": (0.3, {}),
    "pruning.metric": ("params", {}),
    "pruning.allocation": ("uniform", {}),
    "pruning.criterion": ("magnitude", {}),
    "pruning.round_to": (1, {}),
    "pruning.mrs_exponent": (1.0, {"round_to": 1}),
    "pruning.min_keep": (0.6, {}),
    "pruning.keep": (("0",), {}),
    "pruning.limits": ({"0": 0.1}, {}),
    "pruning.branches": (False, {"allocation": "cuts", "round_to": 1}),
    **{f"training.{name}": case for name, case in TRAIN_CASES.items()},
    **{f"finetune.{name}": case for name, case in TRAIN_CASES.items()},
    "evaluation.tier": ("apgd", {}),
    "evaluation.steps": (3, {}),
    "evaluation.restarts": (2, {}),
    "evaluation.sweep": ((0.1,), {}),
    "evaluation.batch_size": (7, {}),
    "evaluation.precision": ("bf16", {}),
    "export.opset": (20, {}),
    "export.precisions": (("fp16",), {}),
    "export.calibration_images": (20, {"precisions": ("int8",)}),
    "bench.batches": ((2,), {}),
    "bench.threads": ((2,), {}),
    "bench.provider": ("cuda", {}),
    "bench.kinds": (("device",), {}),
    "bench.seconds": (3.0, {}),
}
"""Another value, and what else the section must say for it to matter."""


def values_of(section: str) -> list[str]:
    names = (f"{section}.{name}" for name in SECTIONS[section][0].model_fields)
    return [name for name in names if name not in READ_BY_THE_JOB]


@pytest.mark.parametrize("name", [name for section in SECTIONS for name in values_of(section)])
def test_every_value_takes_effect(name: str) -> None:
    section, _, last = name.partition(".")
    kind, effect = SECTIONS[section]
    value, given = CASES[name]
    small = make_settings().model_dump() if issubclass(kind, TrainSettings) else QUICK.get(section, {})
    make = partial(kind, **{**small, **given})
    assert getattr(make(), last) != value, "the value is no other than before"
    before = effect(make())
    assert before == effect(make()), "what the stage does differs from run to run"
    assert before != effect(kind(**{**small, **given, last: value})), f"{name} changes nothing"


def test_no_value_is_named_that_a_section_does_not_have() -> None:
    every = {f"{section}.{name}" for section, (kind, _) in SECTIONS.items() for name in kind.model_fields}
    assert set(CASES) | READ_BY_THE_JOB == every and not set(CASES) & READ_BY_THE_JOB
