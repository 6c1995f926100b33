"""The Python interface, ``import robust_prune as rp``.

    import robust_prune as rp
    model, data = rp.load("demo"), rp.load_data("sample")
    result = rp.compress(model, data, ratio=0.5, out="runs/half")

or step by step:

    analysis = rp.analyse(model, data)
    small = rp.prune(model, rp.plan(analysis, ratio=0.5), data)
    rp.finetune(small, data)
    card = rp.evaluate(small, data, tier="aa-fast")
    rp.export(small, "small.onnx", data)

Every function takes the values of its recipe section as keyword arguments; `robust_prune.recipe` documents them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attacks.threat import ThreatModel
from .bench.latency import run_section
from .bench.types import LatencyTable
from .budget.analysis import Analysis
from .budget.analysis import analyse as _analyse
from .budget.measured import Measured
from .budget.plan import make_plan
from .budget.types import PruningPlan
from .compression import compress as _compress
from .console import warn
from .data.arrays import DataSource
from .data.arrays import as_data as load_data
from .data.base import DataBundle, stratified
from .errors import UsageError
from .evaluation.card import ResultCard
from .evaluation.evaluate import Subject
from .evaluation.evaluate import evaluate as _evaluate
from .exporters.onnx import export_model
from .exporters.types import OnnxArtifact
from .goal import goal_of, reach
from .job import Compressed, Compression
from .machine.device import choose_device
from .models import artifact
from .models.artifact import Model
from .models.foreign import check_data, open_model
from .models.python_module import as_model
from .preflight import preflight
from .ratios import RATIOS
from .ratios import frontier as _frontier
from .recipe import BenchSection, EvaluationSection, ExportSection, FinetuneSettings, PruningSection, Recipe
from .recipe_reader import check_code, check_radii, make_section, with_threat_of
from .recipe_reader import load as load_recipe
from .runs.cache import Cache
from .structure.paths import sample_images
from .surgery.apply import apply
from .surgery.repair import repair
from .training.trainer import train
from .training.types import TrainResult

ModelSource = Model | nn.Module | str | Path
Threat = ThreatModel | float | None
_PLANNING = frozenset({"metric", "allocation", "round_to", "mrs_exponent", "min_keep", "keep", "limits", "branches"})


def load(
    source: str | Path | nn.Module,
    *,
    arch: str | None = None,
    data: DataSource | None = None,
    normalization: str = "auto",
    like: nn.Module | None = None,
    trust_pickle: bool = False,
) -> Model:
    """Open a model, in eval mode on the CPU.

    Args:
        source: ``"demo"`` for the embedded robust model, a file written by `save` or by a run, a file of weights, a
            published model (``timm/NAME``, ``torchvision/NAME``, ``hf-hub:ORG/NAME``, ``robustbench/DATA/THREAT/ID``),
            or a torch module.
        arch: for weights, ``timm/NAME``, ``torchvision/NAME``, ``cifar/NAME`` or ``file.py:function``.
        data: for weights and modules, the data set from which classes and image size are taken.
        normalization: normalization that weights or a module were trained with: ``none``, ``data``, ``imagenet`` or
            ``MEAN/STD`` such as ``0.5/0.5``. With ``auto`` it is the stored or published one, or else measured on
            training images; ``provenance["notes"]`` has the figures.
        like: for the file of a model that was given as a Python object, the same object, built again.
        trust_pickle: whether to open a pickled module, which runs code from the file.

    Raises:
        UsageError: the path, kind of file or architecture is wrong, or the data do not fit the model.
        EnvironmentProblem: the embedded model or a named data set is not available.
    """
    bundle = None if data is None else load_data(data)
    if isinstance(source, nn.Module):
        if bundle is None:
            raise UsageError("a module does not say which images it is for. Give data.")
        return as_model(source, bundle, normalization)
    _check_kind("a model is opened from", source, str, Path, "a file, or 'demo'")
    _check_kind("arch is", arch, str, None, "a text such as 'cifar/resnet18'")
    _check_kind("normalization is", normalization, str, None, "a text such as 'none' or '0.5/0.5'")
    _check_kind("like is", like, nn.Module, None, "the torch module that was saved, built again")
    if like is not None:
        return artifact.load(source, arch=arch, like=like)
    return open_model(source, arch=arch, normalization=normalization, trust_pickle=trust_pickle, data=bundle)


def analyse(model: ModelSource, data: DataSource, *, recipe: str | None = None, **settings: Any) -> Analysis:
    """Find the groups of channels and measure MRS, channel scores and cost, on training images.

    Args:
        model: a `Model`, a torch module of [0, 1] images [N, C, H, W], ``"demo"`` or a file; it is moved to the device
            of the recipe.
        data: data set; see `load_data`.
        recipe: a recipe file, or the name of a shipped recipe.
        settings: values of the recipe, with ``__`` in place of the dot, e.g. ``sensitivity__images=256``.

    Raises:
        UsageError: the model fails on training images in one of its modes, is refused for another reason that the
            message names, or has no group that can be cut; or a setting is wrong.
    """
    bundle = load_data(data)
    opened = _model(model, bundle)
    resolved = _recipe(recipe, settings, opened, None)
    for note in preflight(opened.module, bundle.train, bundle.num_classes, resolved.seed).notes:
        warn(note)
    return _analyse(
        Measured(
            opened.module, opened.spec, bundle.train, resolved, choose_device(resolved.device),
            Cache.named().of_model(opened.spec.arch),
        )
    )  # fmt: skip


def plan(analysis: Analysis, *, ratio: float = 0.5, **pruning: Any) -> PruningPlan:
    """Plan which channels to remove.

    Args:
        analysis: analysis of the model.
        ratio: share of the MACs, or of another ``metric``, to remove, in (0, 1).
        pruning: further values of the recipe section ``pruning``: ``metric``, ``allocation``, ``round_to``,
            ``mrs_exponent`` and ``min_keep``.

    Raises:
        UsageError: a value is out of range or belongs to another step, or the metric is ``latency``, for which
            `compress` is needed.
    """
    _check_kind("plan takes", analysis, Analysis, "the result of analyse")
    section = make_section(PruningSection, ratio=ratio, **pruning)
    if others := sorted(pruning.keys() - _PLANNING):
        raise UsageError(
            f"plan takes ratio, {', '.join(sorted(_PLANNING))}; {', '.join(others)} cannot change a plan. "
            "Channel scores are made by analyse(..., pruning__criterion=...)."
        )
    if section.metric == "latency":
        raise UsageError(
            "a latency budget needs exported candidates: compress(..., pruning__metric='latency') makes them."
        )
    return make_plan(analysis, section)


def prune(model: ModelSource, plan: PruningPlan, data: DataSource, **settings: Any) -> Model:
    """Remove the planned channels, prove every cut against the masked model, and repair the layers behind the cuts.

    Args:
        model: the model of the plan; its weights are not changed, but it may be moved to another device.
        plan: result of `plan`.
        data: data set, whose training images are used for the repair.
        settings: values of the recipe, as in `analyse`; ``pruning__repair="none"`` skips the repair.

    Returns:
        The pruned model, in eval mode on the CPU. Groups whose cut failed its proof are not cut;
        ``provenance["rolled_back"]`` gives the reasons.

    Raises:
        UsageError: a setting is wrong, the model does not fit the data or cannot be traced, or no group of the plan
            could be cut, as with a plan of another model.
        QualityGateError: the pruned model differs from the masked model.
    """
    _check_kind("prune takes", plan, PruningPlan, "the result of plan")
    bundle = load_data(data)
    opened = _model(model, bundle)
    recipe = _recipe(None, settings, opened, None)
    surgery = apply(opened.module.cpu(), plan, opened.spec.blank_image(), sample_images(bundle.train, recipe.seed))
    if surgery.rolled_back and not surgery.applied:
        first = surgery.rolled_back[0]
        raise UsageError(
            f"none of the plan's {len(surgery.rolled_back)} groups could be cut ({first.name}: {first.reason}). "
            "Plan from an analysis of this model."
        )
    repair(surgery, opened.module, bundle.train, recipe, choose_device(recipe.device))
    skipped = {group.name: group.reason for group in surgery.rolled_back}
    provenance = {**opened.provenance, "rolled_back": skipped} if skipped else opened.provenance
    small = surgery.model.cpu().eval()
    return replace(opened, module=small, provenance=provenance)


def finetune(
    model: Model, data: DataSource, *, teacher: ModelSource | None = None, threat: Threat = None, **training: Any
) -> TrainResult:
    """Fine-tune `model` adversarially, in place.

    Args:
        model: a `Model`, e.g. the result of `prune`.
        data: data set, whose training images are used for training and whose held-out images for selection.
        teacher: the dense model, required if ``distillation`` is above 0.
        threat: threat model of the training; a number is the radius of an Linf ball. By default that of the model.
        training: values of the recipe section ``finetune``, such as ``epochs=2`` or ``loss="pgd_at"``.

    Raises:
        UsageError: a value is out of range, or `model` is not a `Model`.
        QualityGateError: training diverged before an epoch was better than the start.
    """
    if not isinstance(model, Model):
        raise UsageError(f"finetune trains a Model in place, as load and prune return it; got {_kind(model)}.")
    bundle = load_data(data)
    check_data(model.spec, num_classes=bundle.num_classes, input_size=bundle.input_size)
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
    """Measure clean and robust accuracy on test images.

    Args:
        model: a `Model`, a torch module of [0, 1] images [N, C, H, W], ``"demo"`` or a file.
        data: data set; see `load_data`.
        threat: threat model; a number such as 8/255 is the radius of an Linf ball. By default that of the model.
        seed: random seed of the attacks.
        evaluation: values of the recipe section ``evaluation``, such as ``tier="aa-fast"`` or ``images=1000``.

    Raises:
        UsageError: a value is out of range, or the model does not fit the data.
        QualityGateError: an attack returned a point outside the threat model.
    """
    bundle = load_data(data)
    opened = _model(model, bundle)
    _check_kind("seed is", seed, int, "a whole number")
    section = make_section(EvaluationSection, **evaluation)
    against = _threat(threat, opened, section.sweep)
    where = next(opened.module.parameters()).device
    try:
        return _evaluate(
            opened.module.to(choose_device("auto")), stratified(bundle.test, section.images), against, section,
            subject=Subject(opened.spec.arch, bundle.name, "test"), seed=seed,
        )  # fmt: skip
    finally:
        opened.module.to(where)


def export(model: ModelSource, path: str | Path, data: DataSource, **settings: Any) -> OnnxArtifact:
    """Write one ONNX file, after a parity check against a float64 reference on training images.

    Args:
        model: a `Model`, a torch module of [0, 1] images [N, C, H, W], ``"demo"`` or a file.
        path: path of the file; its input is ``images``, float32 [batch, C, H, W] in [0, 1], its output ``logits``
            [batch, K].
        data: data set, with at least 9 training images for the check.
        settings: values of the recipe section ``export``, such as ``opset=20``.

    Raises:
        UsageError: a setting is wrong, or the exporter does not support the model.
        QualityGateError: the outputs of the file differ from those of the model.
        EnvironmentProblem: the file cannot be written.
    """
    _check_kind("path is", path, str, Path, "a file such as 'small.onnx'")
    bundle = load_data(data)
    opened = _model(model, bundle)
    return export_model(opened.module, opened.spec, bundle.train, path, make_section(ExportSection, **settings), 0)


def benchmark(files: Mapping[str, str | Path], *, seed: int = 0, **bench: Any) -> LatencyTable:
    """Measure the latency of ONNX files side by side, with confidence intervals and a noise floor.

    Args:
        files: files by label; the first one is the baseline.
        seed: random seed of the order and of the input images.
        bench: values of the recipe section ``bench``, such as ``batches=(1, 32)``.

    Raises:
        UsageError: a value is out of range, or a file is missing or is not an image classifier.
        EnvironmentProblem: the execution provider does not run on this machine.
    """
    _check_kind("files are", files, Mapping, "paths by label, such as {'dense': 'dense.onnx'}")
    for path in files.values():
        _check_kind("a file to time is", path, str, Path, "a path such as 'dense.onnx'")
    return run_section(list(files.items()), make_section(BenchSection, **bench), seed)


def compress(
    model: ModelSource,
    data: DataSource,
    *,
    ratio: float | None = None,
    min_robust: float | None = None,
    max_drop: float | None = None,
    out: str | Path | None = None,
    recipe: str | None = None,
    threat: Threat = None,
    name: str = "model",
    **settings: Any,
) -> Compressed:
    """Prune and fine-tune a model, export it, and measure its latency and robust accuracy.

    A call with the same inputs resumes an interrupted run.

    Args:
        model: a `Model`, a torch module of [0, 1] images [N, C, H, W], ``"demo"`` or a file.
        data: data set; see `load_data`.
        ratio: share of the MACs (or of the recipe's metric) to remove, in (0, 1); by default that of the recipe (0.5).
        min_robust: in place of a ratio, the least robust accuracy in percent; the largest ratio that keeps it is
            searched on held-out images.
        max_drop: in place of a ratio, the most points of robust accuracy to lose against the dense model.
        out: run folder; by default ``runs/NAME-...``.
        recipe: a recipe file, or the name of a shipped recipe.
        threat: threat model; a number is the radius of an Linf ball. By default that of the recipe; what it leaves
            open is taken from the model.
        name: name of the model in tables and folder names.
        settings: values of the recipe, with ``__`` in place of the dot, e.g. ``finetune__epochs=2``.

    Returns:
        The report and the folder. Under a distributed launcher only the first process returns; the others exit.

    Raises:
        UsageError: a setting is wrong, or the folder contains another run.
        QualityGateError: the pruned model or an exported file differs from its reference, training diverged, or no
            ratio meets the goal.
        EnvironmentProblem: the machine lacks a package, a device or disk space.
    """
    if ratio is not None and "pruning__ratio" in settings:
        raise UsageError(f"ratio was given twice: {ratio} and pruning__ratio={settings['pruning__ratio']}. Give one.")
    goal = goal_of(min_robust, max_drop) if (min_robust, max_drop) != (None, None) else None
    if goal is not None and (ratio is not None or "pruning__ratio" in settings):
        raise UsageError("a ratio and a goal are two budgets. Give one of them.")
    job = _job("compress", model, data, out, recipe, threat, name, {"pruning__ratio": ratio, **settings})
    done = _compress(job) if goal is None else reach(job, goal)
    if done is None:
        raise SystemExit(0)
    return done


def frontier(
    model: ModelSource,
    data: DataSource,
    *,
    ratios: Sequence[float] = RATIOS,
    out: str | Path | None = None,
    recipe: str | None = None,
    threat: Threat = None,
    name: str = "model",
    **settings: Any,
) -> Compressed:
    """Compress a model by several ratios, each in a folder of its own, and time all models together.

    A call with the same inputs resumes an interrupted one, and may have other ratios.

    Args:
        model: a `Model`, a torch module of [0, 1] images [N, C, H, W], ``"demo"`` or a file.
        data: data set; see `load_data`.
        ratios: shares of the MACs (or of the recipe's metric) to remove, each in (0, 1).
        out: folder of the frontier; by default ``runs/NAME-frontier-...``.
        recipe, threat, name, settings: as in `compress`.

    Returns:
        The report on all models and the folder. Under a distributed launcher only the first process returns; the others
        exit.

    Raises:
        UsageError, QualityGateError, EnvironmentProblem: as `compress`. A ratio that fails after another succeeded is
            named in the report's notes.
    """
    if "pruning__ratio" in settings:
        raise UsageError("a frontier has several ratios: give ratios=(0.5, 0.75) in place of pruning__ratio.")
    if isinstance(ratios, str) or not isinstance(ratios, Sequence) or not ratios:
        raise UsageError(f"ratios are shares such as (0.5, 0.75), got {ratios!r}.")
    for ratio in ratios:
        make_section(PruningSection, ratio=ratio)
    done = _frontier(_job("frontier", model, data, out, recipe, threat, name, settings), ratios)
    if done is None:
        raise SystemExit(0)
    return done


def _job(
    function: str,
    model: ModelSource,
    data: DataSource,
    out: str | Path | None,
    recipe: str | None,
    threat: Threat,
    name: str,
    settings: Mapping[str, Any],
) -> Compression:
    _check_kind("out is", out, str, Path, None, "a folder such as 'runs/half'")
    _check_kind("name is", name, str, "a text")
    bundle = load_data(data)
    opened = _model(model, bundle)
    resolved = _recipe(recipe, settings, opened, threat)
    command = f"robust_prune.{function}({opened!r}, {bundle!r}, ...) with the recipe of this folder"
    cache = Cache.named().of_model(opened.spec.arch)
    return Compression(name, opened, bundle, resolved, Path(out) if out is not None else None, command, cache)


def save(model: Model, path: str | Path) -> None:
    """Write a model as one ``.safetensors`` or ``.pt`` file, from which `load` rebuilds it bit for bit.

    Raises:
        UsageError: the suffix is another one, or `model` is not a `Model`.
        EnvironmentProblem: the file cannot be written.
    """
    if not isinstance(model, Model):
        raise UsageError(f"save writes a Model, as load and prune return it; got {_kind(model)}.")
    _check_kind("path is", path, str, Path, "a file such as 'small.safetensors'")
    artifact.save(path, model.module.cpu(), model.spec, threat=model.threat, provenance=model.provenance)


def _model(source: Any, data: DataBundle) -> Model:
    if isinstance(source, Model):
        check_data(source.spec, num_classes=data.num_classes, input_size=data.input_size)
        return source
    if isinstance(source, nn.Module):
        return as_model(source, data)
    if isinstance(source, str | Path):
        return open_model(source, data=data)
    raise UsageError(f"a model is a Model, a torch module, 'demo' or a file; got {_kind(source)}.")


def _threat(threat: Any, model: Model, sweep: Sequence[float] = ()) -> ThreatModel:
    found = (model.threat or ThreatModel()) if threat is None else threat
    if isinstance(found, Real) and not isinstance(found, bool):
        found = ThreatModel("linf", float(found))
    if not isinstance(found, ThreatModel):
        raise UsageError(f"a threat is a ThreatModel, or a number such as 8/255 for a Linf ball; got {_kind(found)}.")
    check_radii(found.norm, {"epsilon": (found.epsilon,), "sweep": sweep}, model.spec.input_size)
    return found


def _recipe(source: Any, settings: Mapping[str, Any], model: Model, threat: Threat) -> Recipe:
    _check_kind("recipe is", source, str, Path, None, "a file, or the name of a shipped recipe")
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    if threat is not None:
        chosen = _threat(threat, model)
        changes |= {"threat.norm": chosen.norm, "threat.epsilon": chosen.epsilon}
    found = load_recipe(None if source is None else str(source), changes)
    check_code(found, changes.keys())
    return with_threat_of(found, model.threat, model.spec.input_size)


def _check_kind(what: str, value: object, *wanted: Any) -> None:
    """Raise UsageError unless `value` is of one of the `wanted` types; the last of these says in words what is."""
    *kinds, words = wanted
    if not (value is None and None in kinds) and not isinstance(value, tuple(kind for kind in kinds if kind)):
        raise UsageError(f"{what} {words}; got {_kind(value)}.")


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
