"""Compares allocations and channel criteria at equal MACs and equal fine-tuning.

    python benchmarks/criteria.py runs/cifar10-resnet20x2/model.safetensors --data cifar10

Every arm starts from the same robust model. The same share of its MACs is removed, with the same repair and the same
adversarial fine-tuning. It is evaluated after the cut on held-out training images, and after fine-tuning on test images
that were not used for any selection. Arms differ in the number of channels removed from each group (allocation) and in
their choice (criterion). Controls take the sensitivities out of an arm: they are ignored (exponent 0, or equal for all
layers) or shuffled among the layers. Network slimming (arXiv 1708.06519) first trains the dense model for as long
again with an L1 penalty on its batch-norm scales, which no other arm gets. Two arms are the default method with a
weaker repair.

Widths are multiples of 8, or of the next smaller power of two with which an arm's MACs are within 0.5 % of the target.

    python benchmarks/criteria.py runs/cifar10-resnet20x2/model.safetensors --data cifar10 --ablation --ratios 0.9

`--ablation` compares exponents of MRS instead. It uses held-out training images in place of test images, since the
default exponent is selected by it.

Results are written after every arm, and the same command resumes with the missing arms. `--report` only writes the
tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from criteria_table import tables
from torch import nn

from robust_prune.budget.analysis import Analysis, analyse
from robust_prune.budget.measured import Measured
from robust_prune.budget.plan import PruningPlan, make_plan
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console
from robust_prune.data.base import DataBundle, random_images, random_subset, stratified
from robust_prune.evaluation.card import ResultCard
from robust_prune.evaluation.evaluate import Subject, evaluate
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.device import choose_device
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.models.artifact import Model
from robust_prune.ranking.importance import channel_scores, removed_fraction_curve
from robust_prune.recipe import PruningSection, Recipe
from robust_prune.recipe_reader import load
from robust_prune.runs.files import digest, write_json, write_text
from robust_prune.sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from robust_prune.sensitivity.aggregation import aggregate_groups
from robust_prune.surgery.apply import apply
from robust_prune.surgery.repair import repair
from robust_prune.training.trainer import train

STEPS, SAME_MACS = (8, 4, 2, 1), 0.005
HELD_OUT_IMAGES = 500
NUDGES = (0, 0.005, -0.005, 0.01, -0.01, 0.02, -0.02)


@dataclass(frozen=True)
class Arm:
    """A method of selecting channels.

    Attributes:
        name: name in the tables.
        allocation, criterion, repair, exponent: values of the recipe's section ``pruning``.
        sensitivities: ``measured``, ``equal`` for all layers, or ``shuffled`` among them.
        slimmed: whether the dense model is first trained with an L1 penalty on its batch-norm scales.
    """

    name: str
    allocation: str
    criterion: str
    repair: str = "least_squares"
    exponent: float = PruningSection().mrs_exponent
    sensitivities: str = "measured"
    slimmed: bool = False


ARMS = (
    Arm("mrs", "mrs", "adversarial_taylor"),
    Arm("rank", "rank", "adversarial_taylor"),
    Arm("global", "global", "adversarial_taylor"),
    Arm("mrs, exponent 0", "mrs", "adversarial_taylor", exponent=0),
    Arm("mrs, shuffled", "mrs", "adversarial_taylor", sensitivities="shuffled"),
    Arm("global adversarial Taylor, no MRS", "global", "adversarial_taylor", sensitivities="equal"),
    Arm("global magnitude, no MRS", "global", "magnitude", sensitivities="equal"),
    Arm("network slimming", "global", "bn_scale", sensitivities="equal", slimmed=True),
    Arm("uniform, adversarial Taylor", "uniform", "adversarial_taylor"),
    Arm("uniform, clean Taylor", "uniform", "clean_taylor"),
    Arm("uniform, magnitude", "uniform", "magnitude"),
    Arm("uniform, group norm", "uniform", "group_norm"),
    Arm("uniform, BN scale", "uniform", "bn_scale"),
    Arm("uniform, FPGM", "uniform", "fpgm"),
    Arm("uniform, random", "uniform", "random"),
    Arm("mrs, batch-norm repair only", "mrs", "adversarial_taylor", "batchnorm"),
    Arm("mrs, no repair", "mrs", "adversarial_taylor", "none"),
)
ABLATION = (
    Arm("mrs", "mrs", "adversarial_taylor"),
    *(Arm(f"mrs, exponent {e:g}", "mrs", "adversarial_taylor", exponent=e) for e in (1, 0.5, 0)),
    Arm("rank", "rank", "adversarial_taylor"),
    Arm("global", "global", "adversarial_taylor"),
    Arm("uniform, adversarial Taylor", "uniform", "adversarial_taylor"),
)


def analyses(
    loaded: Model, data: DataBundle, recipe: Recipe, device: str, criteria: Sequence[str]
) -> Iterator[tuple[str, Analysis]]:
    """Yield an analysis for each criterion, that of the recipe first; groups, costs and MRS are measured once."""
    base = analyse(Measured(loaded.module, loaded.spec, data.train, recipe, device))
    yield recipe.pruning.criterion, base
    clean = random_images(data.train, recipe.sensitivity.images, recipe.seed)
    for criterion in dict.fromkeys(criteria):
        if criterion == recipe.pruning.criterion:
            continue
        scores = channel_scores(
            loaded.module, base.search.groups, criterion, clean=clean, seed=recipe.seed, device=device
        )
        removed = {g.name: removed_fraction_curve(loaded.module, g, scores[g.name]) for g in base.search.groups}
        yield criterion, replace(base, scores=scores, removed=removed, criterion=criterion)


def with_sensitivities(analysis: Analysis, which: str, seed: int) -> Analysis:
    """Return the analysis with its sensitivities as they are, equal for all layers, or shuffled among the layers."""
    profile = analysis.profile
    if which == "measured" or profile is None:
        return analysis
    if which == "equal":
        # Sums and means of ones are exact, so that groups of any number of layers are equal to the last bit.
        modules = tuple(replace(m, mrs=1.0, curve=tuple(1.0 for _ in m.curve)) for m in profile.modules)
    else:
        order = np.random.default_rng(seed).permutation(len(profile.modules))
        modules = tuple(
            replace(module, mrs=profile.modules[source].mrs, curve=profile.modules[source].curve)
            for module, source in zip(profile.modules, order, strict=True)
        )
    moved = aggregate_groups(
        replace(profile, modules=modules), analysis.search.groups, "mean" if which == "equal" else profile.aggregation
    )
    return replace(analysis, profile=moved)


def nearest_plan(analysis: Analysis, section: PruningSection) -> PruningPlan:
    """Return the plan with the coarsest widths whose MACs are within 0.5 % of the target, else the nearest.

    For each width the share to remove is moved by up to 2 % of what is kept, since plans stop within 1 % of the dense
    costs.
    """
    target, plans = 1 - section.ratio, []
    for step in STEPS:
        for nudge in NUDGES:
            ratio = 1 - target * (1 + nudge)
            plan = make_plan(analysis, section.model_copy(update={"round_to": step, "ratio": ratio}))
            off = abs(plan.macs_after / plan.macs_before / target - 1)
            if off <= SAME_MACS:
                return plan
            plans.append((off, step, plan))
    return min(plans, key=lambda found: found[:2])[2]


def slimmed(loaded: Model, data: DataBundle, recipe: Recipe, device: str) -> Model:
    """Return the model after as many epochs as fine-tuning has, with an L1 penalty on batch-norm scales."""
    module = copy.deepcopy(loaded.module)
    settings = recipe.finetune.model_copy(update={"loss": f"{Path(__file__).parent / 'slimming.py'}:n_fgsm_l1"})
    train(module, data.train, data.validation, recipe.threat_model, settings, seed=recipe.seed, device=device)
    return replace(loaded, module=module.cpu().eval())


def cut_and_recover(
    arm: Arm,
    ratio: float,
    analysis: Analysis,
    adv: AdversarialSet,
    loaded: Model,
    data: DataBundle,
    recipe: Recipe,
    device: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Prunes, repairs, evaluates on held-out images and fine-tunes; returns the model (eval, CPU) and its row."""
    changes = {
        "ratio": ratio,
        "allocation": arm.allocation,
        "criterion": arm.criterion,
        "repair": arm.repair,
        "mrs_exponent": arm.exponent,
    }
    recipe = recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update=changes)})
    plan = nearest_plan(with_sensitivities(analysis, arm.sensitivities, recipe.seed), recipe.pruning)
    surgery = apply(loaded.module.cpu(), plan, loaded.spec.blank_image())
    begin = time.monotonic()
    repair(surgery, loaded.module, data.train, recipe, device, adv)
    repaired = time.monotonic()
    before = score_before_finetune(surgery.model, data, recipe)
    small = surgery.model.to(device)
    started = time.monotonic()
    tuned = train(
        small, data.train, data.validation, recipe.threat_model, recipe.finetune, seed=recipe.seed, device=device
    )
    finished = time.monotonic()
    return small.cpu().eval(), {
        **asdict(arm),
        "ratio": ratio,
        "seed": recipe.seed,
        "round_to": plan.round_to,
        "commit": snapshot()["commit"],
        "macs_kept": plan.macs_after / plan.macs_before,
        "params_kept": plan.params_after / plan.params_before,
        "widths": {g.name: [g.channels, g.keep] for g in plan.groups},
        "rolled_back": [asdict(r) for r in surgery.rolled_back],
        "before": {"clean": asdict(before.clean), "robust": asdict(before.robust)},
        "held_out_after": max((r.val_robust for r in tuned.history if r.val_robust is not None), default=None),
        "seconds": {"repair": repaired - begin, "finetune": finished - started},
    }


def score_before_finetune(model: nn.Module, data: DataBundle, recipe: Recipe) -> ResultCard:
    """Measure accuracy after the cut on held-out training images; test images are for final results only."""
    section = recipe.evaluation.model_copy(update={"tier": "pgd", "restarts": 1, "sweep": (), "precision": "fp32"})
    subject = Subject("pruned, before fine-tuning", data.name, "validation")
    held_out = stratified(data.validation, HELD_OUT_IMAGES)
    return evaluate(model, held_out, recipe.threat_model, section, subject=subject, seed=recipe.seed)


def scored(model: nn.Module, name: str, data: DataBundle, recipe: Recipe, device: str) -> dict[str, Any]:
    """Return accuracies of `model` on test images, and which images it classifies correctly, as packed bits."""
    section = recipe.evaluation
    with TemporaryDirectory() as folder:
        state = Path(folder) / "state.npz"
        card = evaluate(
            model.to(device), stratified(data.test, section.images), recipe.threat_model, section,
            subject=Subject(name, data.name, "test"), state_path=state,
        )  # fmt: skip
        with np.load(state) as stored:
            bits = {f"{name}_bits": np.packbits(stored[name]).tobytes().hex() for name in ("clean", "robust")}
    return {"clean": asdict(card.clean), "robust": asdict(card.robust), "attack": card.attack, **bits}


def run_arm(
    arm: Arm,
    ratio: float,
    analysis: Analysis,
    adv: AdversarialSet,
    loaded: Model,
    data: DataBundle,
    recipe: Recipe,
    device: str,
) -> dict[str, Any]:
    """Return the row of one arm, with accuracies after the cut and after fine-tuning."""
    small, row = cut_and_recover(arm, ratio, analysis, adv, loaded, data, recipe, device)
    return {**row, "after": scored(small, f"{arm.name} {ratio:g}", data, recipe, device)}


def rows_to_do(args: argparse.Namespace, done: list[dict[str, Any]]) -> list[tuple[int, float, Arm]]:
    """Return the missing rows, seed by seed, so that the tables are complete after each seed."""
    have = {(row["seed"], row["ratio"], row["name"]) for row in done}
    arms = [arm for arm in (ABLATION if args.ablation else ARMS) if not args.arms or arm.name in args.arms]
    wanted = [(seed, ratio, arm) for seed in args.seeds for ratio in args.ratios for arm in arms]
    return [(seed, ratio, arm) for seed, ratio, arm in wanted if (seed, ratio, arm.name) not in have]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the missing rows, store each, and return all results."""
    overrides = {
        "data.name": args.data,
        "sensitivity.images": args.images,
        "pruning.repair_images": args.images,
        "evaluation.images": args.test_images,
        "evaluation.restarts": 1,
        "finetune.epochs": args.epochs,
        "finetune.validation_images": 300,
        "device": args.device,
    }
    recipe = load(args.recipe, overrides)
    data = open_data(recipe)
    loaded = open_model_for(args.model, data, recipe, None)
    data = replace(data, train=random_subset(data.train, args.train_images, 0))
    if args.ablation:
        data = replace(data, test=data.validation)
    device = choose_device(recipe.device)
    settings = {
        "model": models_hash(loaded.module),
        "arch": loaded.spec.arch,
        "data": data.name,
        "split": "held-out training" if args.ablation else "test",
        "train_images": len(data.train),
        "recipe": recipe.model_dump(mode="json", exclude={"seed", "device", "training"}),
    }
    stored: dict[str, Any] = {}
    if args.out.exists():
        stored = json.loads(args.out.read_text(encoding="utf-8"))
        if stored["key"] != digest(settings):
            raise SystemExit(f"{args.out} holds results of other settings. Choose another --out, or remove it.")
    rows: list[dict[str, Any]] = stored.get("rows", [])
    todo = rows_to_do(args, rows)
    found: dict[str, Analysis] = {}
    last_seed, slim = None, None
    for position, (seed, ratio, arm) in enumerate(todo, start=1):
        seeded = recipe.model_copy(update={"seed": seed})
        if seed != last_seed:
            found, last_seed = dict(analyses(loaded, data, seeded, device, [arm.criterion for arm in ARMS])), seed
            slim = None
            adv = make_adversarial_set(
                loaded.module, data.train, seeded.threat_model, seeded.sensitivity, seed=seed, device=device
            )
        if arm.slimmed:
            if slim is None:
                base = slimmed(loaded, data, seeded, device)
                own = seeded.model_copy(
                    update={"pruning": seeded.pruning.model_copy(update={"criterion": arm.criterion})}
                )
                slim = base, analyse(Measured(base.module, base.spec, data.train, own, device))
            row = run_arm(arm, ratio, slim[1], adv, slim[0], data, seeded, device)
        else:
            row = run_arm(arm, ratio, found[arm.criterion], adv, loaded, data, seeded, device)
        rows.append(row)
        result = {"key": digest(settings), "settings": settings, "environment": snapshot(), "rows": rows}
        write_json(args.out, result)
        robust = row["after"]["robust"]
        console.print(
            f"{position}/{len(todo)} seed {seed}, {ratio:.0%} cut, {arm.name}: robust "
            f"{100 * row['before']['robust']['correct'] / row['before']['robust']['total']:.1f} % before, "
            f"{100 * robust['correct'] / robust['total']:.1f} % after fine-tuning",
            markup=False,
        )
    return json.loads(args.out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2", help="threat model, fine-tuning and evaluation")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.75, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = list(dict.fromkeys(arm.name for arm in (*ARMS, *ABLATION)))
    parser.add_argument("--arms", nargs="+", choices=names, metavar="ARM", help=", ".join(names))
    parser.add_argument("--ablation", action="store_true", help="compare readings of MRS on held-out images")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=512, help="for sensitivity, scores and repair")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="results/criteria.json or results/allocation.json by default")
    parser.add_argument("--report", action="store_true", help="draw the tables of what is stored, measure nothing")
    args = parser.parse_args()
    name = "allocation.json" if args.ablation else "criteria.json"
    args.out = args.out or Path(__file__).parent / "results" / name
    tune_allocator()
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.report else measure(args)
    text = tables(result, [arm.name for arm in (*ARMS[:-2], *ABLATION, *ARMS[-2:])])
    write_text(args.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
