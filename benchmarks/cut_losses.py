"""Allocation by the loss of real cuts, beside that by Module Robustness Sensitivity and rules without either.

    python benchmarks/cut_losses.py demo --data cifar10 --recipe cifar10-resnet20x2 --ratios 0.75 0.9 --steps 0 100 700

Question: does an allocation keep more robust accuracy if the loss of a group is measured at real cuts (`cuts`) rather
than at the worst perturbation of its weights (`mrs`), and does it help if branches may go whole?

With ``--metric latency`` the same at equal latency, on an otherwise idle machine: the plan of each arm is the one whose
exported file comes nearest to the wanted latency (batch 1, one thread), and each row has its latency and the branches
that it lacks. That is the test of removing branches whole: ``cuts, branches`` against ``cuts``. Rows then belong in a
file of their own (``--out``).

Arms: ``mrs`` (the default), ``mrs, exponent 0`` (sensitivities ignored), ``uniform``, ``cuts`` (channels alone) and
``cuts, branches``. All have the same scores of channels, repair and number of fine-tuning steps; robust accuracy is
under PGD-20 on held-out training images that chose nothing, right after the repair (0 steps) and after fine-tuning,
whose learning rate ends at 0. Rows are stored one by one, and the same command goes on with the missing ones. Stopping
rule: seeds 0 to 2 of every cell.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recovered import difference, interval, machines, right_images, score_on
from torch import nn

from robust_prune.bench.candidates import CandidateClock
from robust_prune.budget.analysis import Analysis, analyse
from robust_prune.budget.measured import Measured
from robust_prune.budget.plan import make_plan
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.compression import plan_by_clock
from robust_prune.data.base import DataBundle, random_subset
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.device import choose_device
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.models.artifact import Model
from robust_prune.recipe import BenchSection, Recipe
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.structure.paths import sample_images
from robust_prune.surgery.apply import apply
from robust_prune.surgery.repair import repair, repair_set
from robust_prune.training.trainer import train

ARMS: dict[str, dict[str, Any]] = {
    "mrs": {"allocation": "mrs"},
    "mrs, exponent 0": {"allocation": "mrs", "mrs_exponent": 0.0},
    "uniform": {"allocation": "uniform"},
    "cuts": {"allocation": "cuts", "branches": False},
    "cuts, branches": {"allocation": "cuts", "branches": True},
}
"""Changes of the recipe section `pruning`."""
CHOOSE_IMAGES = 500


def pruned(
    base: Model, data: DataBundle, analysis: Analysis, adv: AdversarialSet, recipe: Recipe
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the base, cut by the plan of a recipe and repaired, and what is stored of the cut."""
    section, latency = recipe.pruning, {}
    if section.metric == "latency":
        plan = plan_by_clock(base, data.train, recipe, base.module, analysis, 1 - section.ratio)
    else:
        plan = make_plan(analysis, section)
    images = sample_images(data.train, recipe.seed)
    surgery = apply(base.module.cpu(), plan, base.spec.blank_image(), images)
    if surgery.rolled_back:
        raise SystemExit(f"not all groups were cut: {surgery.rolled_back}")
    repair(surgery, base.module, data.train, recipe, choose_device(recipe.device), adv)
    if section.metric == "latency":
        with CandidateClock.open(base.module, base.spec, data.train, recipe) as clock:
            latency = {"latency_kept": clock.kept(surgery.model), "note": plan.note}
    return surgery.model, {
        "keep": {group.name: group.keep for group in plan.groups},
        "branches": [group.name for group in plan.groups if not group.keep],
        "macs_kept": plan.macs_after / plan.macs_before,
        **latency,
    }


def tuned(cut: nn.Module, base: Model, data: DataBundle, recipe: Recipe, steps: int) -> nn.Module:
    """Return the cut model, fine-tuned in place for a number of steps, in eval mode on the CPU."""
    if steps:
        images = steps * recipe.finetune.batch_size
        epochs = math.ceil(images / len(data.train))
        settings = recipe.finetune.model_copy(update={"epochs": epochs})
        part = random_subset(data.train, images // epochs, recipe.seed)
        chosen_on = random_subset(
            data.train, CHOOSE_IMAGES, recipe.seed
        )  # the held-out images judge, so they do not choose
        device = choose_device(recipe.device)
        train(cut, part, chosen_on, recipe.threat_model, settings, seed=recipe.seed, device=device, teacher=base.module)
    return cut.cpu().eval()


def left(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the shares of the latency that rows keep and the number of branches they lack; empty without latency."""
    if "latency_kept" not in rows[0]:
        return ""
    kept = [100 * row["latency_kept"] for row in rows]
    share = f"{min(kept):.1f} to {max(kept):.1f}" if len(rows) > 1 else f"{kept[0]:.1f}"
    return f"; {share} % of the latency, {np.mean([len(row['branches']) for row in rows]):.2g} branches removed"


def table(result: Mapping[str, Any]) -> str:
    """Return the Markdown table."""
    rows = result["rows"]
    cells = sorted({(row["ratio"], row["steps"]) for row in rows})
    lines = [
        f"# Loss of real cuts\n\n`benchmarks/cut_losses.py`: {result['arch']} on {result['data']}, robust accuracy "
        "in % under PGD-20 from one start on the margin on held-out training images, right after the repair and after "
        "steps of fine-tuning; beside it the paired difference to mrs, 95 % intervals over seeds and images.\n",
        f"| {'latency' if result.get('metric') == 'latency' else 'MACs'} removed | steps | " + " | ".join(ARMS) + " |",
        "| ---: | ---: |" + " --- |" * len(ARMS),
    ]
    for ratio, steps in cells:
        found = {
            arm: {r["seed"]: right_images(r["score"], "robust") for r in rows if (r["ratio"], r["steps"], r["arm"]) ==
                  (ratio, steps, arm)} for arm in ARMS
        }  # fmt: skip
        texts = []
        for arm in ARMS:
            if not found[arm]:
                texts.append("–")
                continue
            values = 100 * np.stack(list(found[arm].values()))
            low, high = interval(values)
            apart = "" if arm == "mrs" else f", {difference(found[arm], found['mrs'])}"
            mine = [row for row in rows if (row["ratio"], row["steps"], row["arm"]) == (ratio, steps, arm)]
            texts.append(f"{values.mean():.1f} [{low:.1f}, {high:.1f}]{apart}, {len(values)} seeds{left(mine)}")
        lines.append(f"| {100 * ratio:g} % | {steps} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + f"\n\nMeasured on {machines(rows)}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2")
    parser.add_argument("--metric", default="macs", choices=["macs", "latency"], help="of what the ratios are shares")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.9])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 700], help="fine-tuning steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cut_losses.json")
    args = parser.parse_args()
    tune_allocator()
    environment = snapshot()
    base_recipe = load(args.recipe, {"data.name": args.data})
    data = open_data(base_recipe)
    base = open_model_for(args.model, data, base_recipe, None)
    device = choose_device(base_recipe.device)
    settings = {"model": models_hash(base.module), "arch": base.spec.arch, "data": data.name, "recipe": args.recipe}
    settings["metric"] = args.metric
    result: dict[str, Any] = {**settings, "rows": []}
    if args.out.exists():
        result = {"metric": "macs"} | json.loads(args.out.read_text(encoding="utf-8"))
    if {key: result.get(key) for key in settings} != settings:
        raise SystemExit(f"{args.out} was made with other settings than {settings}. Move it away or use --out.")
    for seed in args.seeds:
        wanted = [(r, a, s) for r in args.ratios for a in args.arms for s in args.steps]
        have = {(row["ratio"], row["arm"], row["steps"]) for row in result["rows"] if row["seed"] == seed}
        if not set(wanted) - have:
            continue
        section = base_recipe.pruning.model_copy(update={"allocation": "cuts", "branches": True, "metric": args.metric})
        recipe = base_recipe.model_copy(
            update={"seed": seed, "pruning": section, "bench": BenchSection(kinds=("host",))}
        )
        analysis = analyse(Measured(base.module, base.spec, data.train, recipe, device))
        adv = repair_set(base.module, data.train, recipe, device)
        measured = {name: [vars(cut) for cut in cuts] for name, cuts in (analysis.cut_losses or {}).items()}
        for ratio, arm in dict.fromkeys((ratio, arm) for ratio, arm, _ in wanted):
            todo = [steps for steps in args.steps if (ratio, arm, steps) not in have]
            if not todo:
                continue
            changed = recipe.pruning.model_copy(update={"ratio": ratio, **ARMS[arm]})
            chosen = recipe.model_copy(update={"pruning": changed})
            cut, what = pruned(base, data, analysis, adv, chosen)
            for steps in todo:
                small = tuned(copy.deepcopy(cut), base, data, chosen, steps)
                score = score_on(small, data.validation, "held-out", data, chosen, device)
                row = {"seed": seed, "ratio": ratio, "steps": steps, "arm": arm, **what, "score": score}
                result["rows"].append({**row, "cut_losses": measured, "environment": environment})
                write_json(args.out, result)
                write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
