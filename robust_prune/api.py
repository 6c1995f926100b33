"""The front door for Python: what ``import robust_prune as rp`` gives.

    import robust_prune as rp
    model, data = rp.load("demo"), rp.load_data("sample")
    result = rp.compress(model, data, ratio=0.5, out="runs/half")

or step by step:

    analysis = rp.analyse(model, data)
    small = rp.prune(model, rp.plan(analysis, ratio=0.5), data)
    rp.finetune(small, data)
    card = rp.evaluate(small, data, tier="aa-fast")
    rp.export(small, "small.onnx", data)

Every function takes the values of its section of a recipe as keywords; `robust_prune.recipe` says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attacks.threat import ThreatModel
from .bench.latency import run_section
from .bench.types import LatencyTable
from .budget.analysis import Analysis
from .budget.analysis import analyse as _analyse
from .budget.plan import make_plan
from .budget.types import PruningPlan
from .compression import compress as _compress
from .data.arrays import DataSource
from .data.arrays import as_data as load_data
from .data.base import DataBundle, first
from .errors import UsageError
from .evaluation.card import ResultCard
from .evaluation.evaluate import Subject
from .evaluation.evaluate import evaluate as _evaluate
from .exporters.onnx import export_model
from .exporters.types import OnnxArtifact
from .job import Compressed, Compression
from .machine.device import choose_device
from .models import artifact
from .models.artifact import Model
from .models.foreign import open_model
from .models.python_module import as_model
from .recipe import BenchSection, EvaluationSection, ExportSection, FinetuneSettings, PruningSection, Recipe
from .recipe_reader import load as load_recipe
from .recipe_reader import make_section
from .surgery.apply import apply
from .surgery.repair import repair
from .training.trainer import train
from .training.types import TrainResult

ModelSource = Model | nn.Module | str | Path
Threat = ThreatModel | float | None


def load(
    source: str | Path,
    *,
    arch: str | None = None,
    data: DataSource | None = None,
    like: nn.Module | None = None,
    trust_pickle: bool = False,
) -> Model:
    """Opens a model.

    Args:
        source: ``"demo"`` for the embedded robust model, or a file: one that `save` or a run wrote, or weights.
        arch: for weights, ``timm/NAME``, ``torchvision/NAME``, ``cifar/NAME`` or ``file.py:function``.
        data: for weights, what they were trained on: gives classes, image size and normalization.
        like: for a file of a model that was given as a Python object: the same object, built again.
        trust_pickle: open a pickled module, which runs code from the file.

    Raises:
        UsageError: a wrong path, kind of file or architecture, or data that do not fit.
    """
    if like is not None:
        return artifact.load(source, arch=arch, like=like)
    bundle = None if data is None else load_data(data)
    return open_model(source, arch=arch, trust_pickle=trust_pickle, data=bundle)


def analyse(model: ModelSource, data: DataSource, *, recipe: str | None = None, **settings: Any) -> Analysis:
    """Groups of channels, their MRS and the channels' scores, from training images.

    Args:
        model: `Model`, module of [0, 1] images, ``"demo"`` or a file.
        data: see `load_data`.
        recipe: a recipe file, or the name of a shipped one.
        settings: dotted values of the recipe with ``__`` for the dot, e.g. ``sensitivity__images=256``.

    Raises:
        UsageError: nothing can be cut, or a setting is wrong.
    """
    bundle = load_data(data)
    opened = _model(model, bundle)
    resolved = _recipe(recipe, settings, opened, None)
    return _analyse(opened.module, opened.spec, bundle.train, resolved, choose_device(resolved.device))


def plan(analysis: Analysis, *, ratio: float = 0.5, **pruning: Any) -> PruningPlan:
    """Which channels to remove.

    Args:
        analysis: of the model.
        ratio: share of the MACs to remove, in (0, 1).
        pruning: values of the recipe's section ``pruning``, such as ``metric="params"`` or ``allocation="uniform"``.

    Raises:
        UsageError: a value out of range.
    """
    section = make_section(PruningSection, ratio=ratio, **pruning)
    if section.metric == "latency":
        raise UsageError("a latency budget needs exported candidates: compress(..., pruning__of='latency') makes them.")
    return make_plan(analysis, section)


def prune(model: ModelSource, plan: PruningPlan, data: DataSource, **settings: Any) -> Model:
    """A smaller model: channels removed, every group proved against the masked model, readers repaired.

    Args:
        model: that the plan was made for; it stays as it is.
        plan: see `plan`.
        data: training images for the repair.
        settings: see `analyse`; ``pruning__compensation="none"`` leaves the repair out.

    Returns:
        The pruned model. Groups that could not be cut stay whole; ``provenance["rolled_back"]`` names them.
    """
    bundle = load_data(data)
    opened = _model(model, bundle)
    recipe = _recipe(None, settings, opened, None)
    surgery = apply(opened.module.cpu(), plan, opened.spec.blank_image())
    repair(surgery, opened.module, bundle.train, recipe, choose_device(recipe.device))
    skipped = {group.name: group.reason for group in surgery.rolled_back}
    provenance = {**opened.provenance, "rolled_back": skipped} if skipped else opened.provenance
    small = surgery.model.cpu().eval()
    return replace(opened, module=small, provenance=provenance)


def finetune(
    model: Model, data: DataSource, *, teacher: ModelSource | None = None, threat: Threat = None, **training: Any
) -> TrainResult:
    """Adversarial fine-tuning of `model`, in place.

    Args:
        model: a `Model`, e.g. what `prune` returned.
        data: trained on its training images, selected on its held-out ones.
        teacher: the dense parent, where ``distillation`` is above 0.
        threat: what to train against; a number is a radius of the Linf ball. The model's own by default.
        training: values of the recipe's section ``finetune``, such as ``epochs=2`` or ``loss="pgd_at"``.

    Raises:
        UsageError: a value out of range, or another kind of model.
    """
    if not isinstance(model, Model):
        raise UsageError(f"finetune trains a Model in place, as load and prune return it; got {_kind(model)}.")
    bundle = load_data(data)
    settings = make_section(FinetuneSettings, **training)
    parent = _model(teacher, bundle).module if teacher is not None else None
    device = choose_device("auto")
    result = train(
        model.module, bundle.train, bundle.validation, _threat(threat, model), settings, device=device, teacher=parent
    )
    model.module.cpu().to(memory_format=torch.contiguous_format).eval()
    return result


def evaluate(
    model: ModelSource, data: DataSource, threat: Threat = None, *, seed: int = 0, **evaluation: Any
) -> ResultCard:
    """Clean and robust accuracy on test images.

    Args:
        model: `Model`, module of [0, 1] images, ``"demo"`` or a file.
        data: see `load_data`.
        threat: what the attacker may do; a number such as 8/255 is a radius of the Linf ball. The model's own by
            default.
        seed: of the attacks' random starts.
        evaluation: values of the recipe's section ``evaluation``, such as ``tier="aa-fast"`` or ``images=1000``.

    Raises:
        UsageError: a value out of range, or a model that does not fit the data.
    """
    bundle = load_data(data)
    opened = _model(model, bundle)
    section = make_section(EvaluationSection, **evaluation)
    where = next(opened.module.parameters()).device
    try:
        return _evaluate(
            opened.module.to(choose_device("auto")), first(bundle.test, section.images), _threat(threat, opened),
            section, subject=Subject(opened.spec.arch, bundle.name, "test"), seed=seed,
        )  # fmt: skip
    finally:
        opened.module.to(where)


def export(model: ModelSource, path: str | Path, data: DataSource, **settings: Any) -> OnnxArtifact:
    """Writes one ONNX file, checked against float64 on training images.

    Args:
        model: `Model`, module of [0, 1] images, ``"demo"`` or a file.
        path: of the file; its input is ``images``, float32 [batch, C, H, W] in [0, 1], its output ``logits``.
        data: images for the check.
        settings: values of the recipe's section ``export``, such as ``opset=20``.

    Raises:
        QualityGateError: the file does not compute what the model does.
    """
    bundle = load_data(data)
    opened = _model(model, bundle)
    return export_model(opened.module, opened.spec, bundle.train, path, make_section(ExportSection, **settings), 0)


def benchmark(files: Mapping[str, str | Path], *, seed: int = 0, **bench: Any) -> LatencyTable:
    """Latency of ONNX files side by side, with intervals and a noise floor.

    Args:
        files: by label; the first is what the others are compared with.
        seed: of the visiting order and the input images.
        bench: values of the recipe's section ``bench``, such as ``batches=(1, 32)``.
    """
    return run_section(list(files.items()), make_section(BenchSection, **bench), seed)


def compress(
    model: ModelSource,
    data: DataSource,
    *,
    ratio: float | None = None,
    out: str | Path | None = None,
    recipe: str | None = None,
    threat: Threat = None,
    name: str = "model",
    **settings: Any,
) -> Compressed:
    """The whole job: a smaller robust model, its ONNX file, and one table with latency and robust accuracy.

    Run again with the same inputs, it goes on where it was.

    Args:
        model: `Model`, module of [0, 1] images, ``"demo"`` or a file.
        data: see `load_data`.
        ratio: share of the MACs to remove, in (0, 1); the recipe's (0.5) by default.
        out: the run folder; ``runs/NAME-...`` by default.
        recipe: a recipe file, or the name of a shipped one.
        threat: what to be robust against; a number is a radius of the Linf ball. The model's own by default.
        name: of the model, in tables and folder names.
        settings: dotted values of the recipe with ``__`` for the dot, e.g. ``finetune__epochs=2``.

    Returns:
        The report and the folder. Under a distributed launcher only the first process returns.

    Raises:
        UsageError: a wrong setting, or a folder that holds another run.
        QualityGateError: surgery or export made something that is not equal to what it should be.
    """
    bundle = load_data(data)
    opened = _model(model, bundle)
    resolved = _recipe(recipe, {"pruning__ratio": ratio, **settings}, opened, threat)
    command = f"robust_prune.compress({opened!r}, {bundle!r}, ...) with the recipe of this folder"
    job = Compression(name, opened, bundle, resolved, Path(out) if out is not None else None, command, opened.spec.arch)
    done = _compress(job)
    if done is None:
        raise SystemExit(0)
    return done


def save(model: Model, path: str | Path) -> None:
    """Writes a model as one ``.safetensors`` or ``.pt`` file, which `load` opens bit for bit.

    Raises:
        UsageError: another suffix, or another kind of model.
        EnvironmentProblem: the file cannot be written.
    """
    if not isinstance(model, Model):
        raise UsageError(f"save writes a Model, as load and prune return it; got {_kind(model)}.")
    artifact.save(path, model.module.cpu(), model.spec, threat=model.threat, provenance=model.provenance)


def _model(source: Any, data: DataBundle) -> Model:
    if isinstance(source, Model):
        return source
    if isinstance(source, nn.Module):
        return as_model(source, data)
    if isinstance(source, str | Path):
        return open_model(source, data=data)
    raise UsageError(f"a model is a Model, a torch module, 'demo' or a file; got {_kind(source)}.")


def _threat(threat: Threat, model: Model) -> ThreatModel:
    if threat is None:
        return model.threat or ThreatModel()
    if isinstance(threat, ThreatModel):
        return threat
    if isinstance(threat, int | float) and not isinstance(threat, bool):
        return ThreatModel("linf", float(threat))
    raise UsageError(f"a threat is a ThreatModel, or a number such as 8/255 for a Linf ball; got {_kind(threat)}.")


def _recipe(source: str | None, settings: Mapping[str, Any], model: Model, threat: Threat) -> Recipe:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    if threat is not None or source is None:
        chosen = _threat(threat, model)
        changes = {"threat.norm": chosen.norm, "threat.epsilon": chosen.epsilon} | changes
    return load_recipe(source, changes)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
