"""The stages of the main job, each from plain values to plain values; `pipeline` puts them in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .attacks import ThreatModel
from .bench.latency import check_kinds
from .bench.providers import require
from .budget.cost import CostModel, cost_model, count_macs, count_params
from .budget.plan import check_groups, make_plan
from .budget.types import PruningPlan
from .data.base import DataBundle, ImageSet, first, random_subset
from .errors import EnvironmentProblem, UsageError
from .evaluation.card import ResultCard
from .evaluation.evaluate import Evaluation, evaluate_with_twins
from .evaluation.onnx_scores import OnnxTwin
from .export.onnx import export_onnx
from .export.parity import MIN_IMAGES
from .export.precision import Precision, export_reduced
from .export.types import OnnxArtifact
from .models.layout import has_fast_bf16
from .models.spec import ModelSpec
from .ranking.importance import channel_scores, removed_fraction_curve
from .recipe import EvaluationSection, ExportSection, PruningSection, Recipe, SensitivitySection, TrainSettings
from .sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from .sensitivity.estimators import measure
from .sensitivity.profile import SensitivityProfile
from .structure.groups import GroupSearch, find_groups
from .surgery.apply import Surgery, apply
from .surgery.batchnorm import reestimate_batchnorm
from .surgery.reconstruction import reconstruct
from .training.trainer import train
from .training.types import TrainResult

PARITY_IMAGES = 16
BEFORE_FINETUNE_IMAGES = 500


@dataclass(frozen=True)
class Analysis:
    """What planning needs to know about a model.

    Attributes:
        search: groups that can be cut, and those that cannot.
        cost: closed-form cost over kept channels.
        profile: MRS of modules and groups.
        scores: importance of each channel, by group.
        removed: relative size of the weight perturbation that removing the k least important channels is, by group.
    """

    search: GroupSearch
    cost: CostModel
    profile: SensitivityProfile
    scores: Mapping[str, Tensor]
    removed: Mapping[str, Tensor]


def threat_of(recipe: Recipe) -> ThreatModel:
    """The recipe's threat model."""
    return ThreatModel(recipe.threat.norm, recipe.threat.epsilon)


def device_of(recipe: Recipe) -> str:
    """``cpu`` or ``cuda``, as the recipe and the machine say.

    Raises:
        EnvironmentProblem: CUDA was asked for and is not there.
    """
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem("device cuda was asked for, but torch finds no CUDA device. Use --device cpu.")
    return recipe.device


def check_provider(recipe: Recipe) -> None:
    """Says before hours of work, not after them, that latency cannot be measured where the recipe wants it.

    Raises:
        EnvironmentProblem: a GPU provider was asked for and does not run here.
        UsageError: the provider has no rows of the recipe's kinds.
    """
    require(recipe.bench.provider)
    check_kinds(recipe.bench.provider, recipe.bench.kinds)


def blank_image(spec: ModelSpec) -> Tensor:
    """One image [1, C, H, W] of the model's input size; only its shape matters."""
    return torch.zeros(1, *spec.input_size)


def adversarial_set(
    model: nn.Module, images: ImageSet, threat: ThreatModel, section: SensitivitySection, seed: int, device: str
) -> AdversarialSet:
    """The fixed adversarial set D_adv, from training images."""
    return make_adversarial_set(
        model, images, threat, count=section.images, steps=section.steps, seed=seed, device=device
    )


def measure_sensitivity(
    model: nn.Module,
    adv: AdversarialSet,
    threat: ThreatModel,
    section: SensitivitySection,
    search: GroupSearch,
    device: str,
) -> SensitivityProfile:
    """MRS of every module and group."""
    return measure(
        model,
        adv,
        threat,
        estimator=section.estimator,
        rho=section.rho,
        groups=search.groups,
        aggregation=section.aggregation,
        device=device,
    )


def analyse(
    model: nn.Module,
    spec: ModelSpec,
    images: ImageSet,
    recipe: Recipe,
    device: str,
    dense: Mapping[str, int] | None = None,
) -> Analysis:
    """Groups, costs, sensitivity and channel scores of a model, from training images only.

    `dense` are the groups' channels before earlier cuts, by name: floors are a share of them.
    """
    threat, example = threat_of(recipe), blank_image(spec)
    model.cpu()
    search = find_groups(model, example)
    check_groups(search)
    search = replace(search, groups=tuple(replace(g, dense=(dense or {}).get(g.name)) for g in search.groups))
    cost = cost_model(model, example, search.groups)
    model.to(device)
    adv = adversarial_set(model, images, threat, recipe.sensitivity, recipe.seed, device)
    profile = measure_sensitivity(model, adv, threat, recipe.sensitivity, search, device)
    scores = channel_scores(
        model,
        search.groups,
        recipe.pruning.criterion,
        adv=adv,
        clean=_clean_images(images, recipe.sensitivity.images, recipe.seed),
        seed=recipe.seed,
        device=device,
    )
    removed = {g.name: removed_fraction_curve(model, g, scores[g.name]) for g in search.groups}
    return Analysis(search, cost, profile, scores, removed)


def _clean_images(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    chosen = random_subset(images, count, seed)
    x, y = chosen.get(torch.arange(len(chosen)))
    return x.float() / 255, y


def plan_cut(analysis: Analysis, section: PruningSection) -> PruningPlan:
    """Which channels go, and what that saves."""
    return make_plan(
        analysis.search,
        analysis.cost,
        analysis.profile,
        analysis.scores,
        analysis.removed,
        ratio=section.ratio,
        of=section.of,
        allocation=section.allocation,
        criterion=section.criterion,
        align=section.align,
        min_keep=section.min_keep,
        exponent=section.mrs_exponent,
    )


def cut(model: nn.Module, plan: PruningPlan, spec: ModelSpec, images: ImageSet, recipe: Recipe, device: str) -> Surgery:
    """The smaller model, repaired without training: see `compensate`."""
    surgery = apply(model.cpu(), plan, blank_image(spec))
    compensate(surgery, model, images, recipe, device)
    return surgery


def compensate(
    surgery: Surgery,
    dense: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    device: str,
    adv: AdversarialSet | None = None,
) -> None:
    """Repairs the cut model in place, as the recipe says; it ends on `device`.

    `adv` is the adversarial set that least squares reads; without one it is made.
    """
    small, section = surgery.model.to(device), recipe.pruning
    count = min(section.compensation_images, len(images))
    if section.compensation == "batchnorm":
        reestimate_batchnorm(small, images, count=count, device=device)
    elif section.compensation == "least_squares":
        dense.to(device)
        chosen = recipe.sensitivity.model_copy(update={"images": count})
        adv = adv or adversarial_set(dense, images, threat_of(recipe), chosen, recipe.seed, device)
        clean, _ = _clean_images(images, count, recipe.seed)
        reconstruct(small, dense, surgery.gone, torch.cat([clean, adv.images]))


def finetune(
    model: nn.Module,
    data: DataBundle,
    threat: ThreatModel,
    settings: TrainSettings,
    *,
    seed: int,
    device: str,
    checkpoint: Path | None = None,
    teacher: nn.Module | None = None,
) -> TrainResult:
    """Adversarial training of `model` in place, selected on the validation part; `teacher` is the dense parent."""
    return train(
        model, data.train, data.validation, threat, settings,
        seed=seed, device=device, checkpoint=checkpoint, teacher=teacher,
    )  # fmt: skip


def check_images(data: DataBundle) -> None:
    """Says before hours of work that an export could not be checked at its end.

    Raises:
        UsageError: too few training images.
    """
    if len(data.train) < MIN_IMAGES:
        raise UsageError(
            f"{data.name} leaves {len(data.train)} training images beside the held-out ones; the exported file is "
            f"checked on at least {MIN_IMAGES}. Give more images."
        )


def parity_images(data: DataBundle, count: int = PARITY_IMAGES) -> Tensor:
    """A few training images [N, C, H, W] in [0, 1] for the export's parity gate."""
    x, _ = data.train.get(torch.arange(min(count, len(data.train))))
    return x.float() / 255


def export(model: nn.Module, spec: ModelSpec, data: DataBundle, path: Path, opset: int, seed: int) -> OnnxArtifact:
    """Writes and checks the ONNX file of `model`."""
    manifest = {"model": spec.to_json(), "seed": seed}
    return export_onnx(model, path, parity_images(data), manifest=manifest, opset=opset, class_names=spec.class_names)


def export_precisions(
    model: nn.Module, data: DataBundle, source: Path, section: ExportSection
) -> dict[Precision, OnnxArtifact]:
    """The files of lower precision that the recipe wants, beside the fp32 file at `source`."""
    images = parity_images(data, section.calibration_images)
    return {
        precision: export_reduced(source, reduced_path(source, precision), precision, model, images)
        for precision in section.precisions
    }


def reduced_path(source: Path, precision: Precision) -> Path:
    """Where a file of lower precision lies: ``model.int8.onnx`` beside ``model.onnx``."""
    return source.with_name(f"{source.stem}.{precision}{source.suffix or '.onnx'}")


def evaluate_model(
    model: nn.Module,
    data: DataBundle,
    threat: ThreatModel,
    section: EvaluationSection,
    *,
    name: str,
    seed: int,
    device: str,
    onnx: Mapping[str, Path] | None = None,
    state_path: Path | None = None,
    together: bool = False,
) -> Evaluation:
    """Clean and robust accuracy on test images; with `onnx`, also those of exported files by name.

    With `together` all processes of a distributed run must call it, and divide the attacks among them. The card names
    MACs and parameters too. Gradients are in bf16 where the hardware is fast at it.
    """
    found = evaluate_with_twins(
        model,
        first(data.test, section.images),
        threat,
        model_name=name,
        data_name=data.name,
        tier=section.tier,
        steps=section.steps,
        restarts=section.restarts,
        batch_size=section.batch_size,
        seed=seed,
        device=device,
        state_path=state_path,
        precision="bf16" if has_fast_bf16(torch.device(device)) else "fp32",
        sweep=section.sweep,
        twins={name: OnnxTwin(path) for name, path in (onnx or {}).items()},
        together=together,
    )
    few, _ = data.test.get(torch.arange(1))
    macs = count_macs(model.cpu(), torch.zeros(few.shape))
    return replace(found, card=replace(found.card, macs=macs, params=count_params(model)))


def score_before_finetune(
    model: nn.Module, data: DataBundle, threat: ThreatModel, section: EvaluationSection, seed: int, device: str
) -> ResultCard:
    """Accuracy right after the cut, on held-out training images: the test split waits for the final figure."""
    return evaluate_with_twins(
        model,
        first(data.validation, BEFORE_FINETUNE_IMAGES),
        threat,
        model_name="pruned, before fine-tuning",
        data_name=data.name,
        split="validation",
        steps=section.steps,
        restarts=1,
        batch_size=section.batch_size,
        seed=seed,
        device=device,
    ).card
