"""Module Robustness Sensitivity to the cut itself, and what plans by it keep, beside those of the present estimators.

    python benchmarks/cut_losses.py demo --data cifar10 --recipe cifar10-resnet20x2 --ratios 0.75 0.9 --steps 0 100

Question: does an allocation keep more robust accuracy if the loss of a group is measured at real cuts rather than at
the worst perturbation of its weights? Each group alone is cut to some widths: the columns of its readers (the layers
that read its channels) at the removed channels become zero, and their other columns are solved anew by least squares
from the Gram matrix of their dense inputs, which one pass over some images gives for all readers. Two losses are taken:

- ``transferred``: the robust loss on adversarial images of the dense model;
- ``attacked``: the same after a few more steps of the attack on the cut model.

Arms: ``mrs`` (the default), ``mrs, exponent 0`` (sensitivities ignored), ``uniform``, and the mrs allocation with
either loss. All have the same scores of channels, repair and number of fine-tuning steps; robust accuracy is under
PGD-20 on held-out training images that chose nothing, right after the repair (0 steps) and after fine-tuning. Rows are
stored one by one, and the same command goes on with the missing ones. Stopping rule: seeds 0 to 2 of every cell.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from recovered import difference, interval, right_images, score_on
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel, pgd
from robust_prune.attacks.context import frozen_eval
from robust_prune.attacks.pgd import cross_entropy_objective
from robust_prune.budget.allocations import mrs
from robust_prune.budget.analysis import Analysis, analyse
from robust_prune.budget.plan import make_plan
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.data.base import DataBundle, random_images, random_subset
from robust_prune.machine.device import choose_device
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.models.artifact import Model
from robust_prune.recipe import Recipe
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text
from robust_prune.structure.types import ChannelGroup
from robust_prune.surgery.apply import apply
from robust_prune.surgery.reconstruction import RIDGE, _rows
from robust_prune.surgery.repair import repair
from robust_prune.training.trainer import train

SHARES = (0.5, 0.25, 0.125)
"""Kept shares of the channels at which a group's loss is measured."""
IMAGES, GRAM_IMAGES, STEPS, STEP = 192, 512, 2, 0.5
"""Images of the loss and of the Gram matrices, steps of the attack on a cut model, and their size in radii."""
ARMS = ("mrs", "mrs, exponent 0", "uniform", "transferred", "attacked")
Curves = dict[str, dict[int, float]]
"""Rise of the robust loss in nats by group and number of kept channels."""


@dataclass(frozen=True)
class Attacked:
    """Images of the loss: their centres, adversarial images of the dense model, labels and the threat model."""

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    threat: ThreatModel

    def loss(self, model: nn.Module, steps: int) -> float:
        """Return the robust loss in nats after `steps` more steps of the attack on `model`."""
        found = self.adversarial
        if steps:
            found = pgd(
                model, self.clean, self.labels, self.threat, steps=steps, step_size=STEP * self.threat.epsilon,
                objective=cross_entropy_objective(self.labels), start=found,
            )  # fmt: skip
        with torch.no_grad():
            return F.cross_entropy(model(found), self.labels).item()


def readers(model: nn.Module, group: ChannelGroup) -> dict[str, list[tuple[int, int]]]:
    """Return the plain layers that read a group's channels, each with pairs of (input position, channel)."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part in group.slices:
        if part.side != "in":
            continue
        layer: Any = model.get_submodule(part.target)
        if type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward) and getattr(layer, "groups", 1) == 1:
            found.setdefault(part.target, []).extend(zip(part.index, part.root, strict=True))
    return found


@torch.no_grad()
def gram_matrices(model: nn.Module, names: set[str], images: Tensor, batch: int = 64) -> dict[str, Tensor]:
    """Return XᵀX of the inputs of each layer, by one pass over the images."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _rows(layer, args[0])
            assert rows is not None, f"{name} pads its input in a way of its own"
            found[name] = found.get(name, 0) + (rows.T @ rows).double()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    for part in images.split(batch):
        model(part)
    for handle in handles:
        handle.remove()
    return found


def solved(layer: Any, gram: Tensor, gone: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer without the inputs `gone`, the other ones solved anew."""
    weight = layer.weight.detach()
    flat = weight.reshape(len(weight), -1).double()
    dead = torch.zeros(weight.shape[1], dtype=torch.bool)
    dead[list(gone)] = True
    dead = dead.repeat_interleave(flat.shape[1] // weight.shape[1])
    if layer.bias is not None:
        flat = torch.cat([flat, layer.bias.detach().double()[:, None]], 1)
        dead = torch.cat([dead, torch.zeros(1, dtype=torch.bool)])
    kept = gram[~dead][:, ~dead]
    ridge = RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=kept.dtype)
    change = torch.linalg.solve(kept + ridge, gram[~dead][:, dead] @ flat[:, dead].T)
    new = torch.zeros_like(flat)
    new[:, ~dead] = flat[:, ~dead] + change.T
    bias = None if layer.bias is None else new[:, -1].to(weight.dtype)
    return new[:, : weight[0].numel()].reshape(weight.shape).to(weight.dtype), bias


@contextmanager
def cut(
    model: nn.Module, group: ChannelGroup, keep: int, scores: Tensor, grams: Mapping[str, Tensor]
) -> Iterator[None]:
    """Cut a group to its `keep` best channels inside the block, with its readers solved anew."""
    gone = set(scores.argsort(stable=True)[: group.channels - keep].tolist())
    saved = []
    for name, pairs in readers(model, group).items():
        layer: Any = model.get_submodule(name)
        saved.append((layer, layer.weight.data, None if layer.bias is None else layer.bias.data))
        layer.weight.data, bias = solved(layer, grams[name], [at for at, channel in pairs if channel in gone])
        if bias is not None:
            layer.bias.data = bias
    try:
        yield
    finally:
        for layer, weight, bias in saved:
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias


def cut_curves(model: nn.Module, analysis: Analysis, images: Attacked, gram_images: Tensor, steps: int) -> Curves:
    """Return the rise of the robust loss of each group at `SHARES`, the other groups whole."""
    groups, curves = analysis.search.groups, Curves()
    with frozen_eval(model):
        grams = gram_matrices(model, {name for group in groups for name in readers(model, group)}, gram_images)
        base = images.loss(model, steps)
        for group in groups:
            for keep in sorted({max(1, round(share * group.channels)) for share in SHARES}):
                with cut(model, group, keep, analysis.scores[group.name], grams):
                    curves.setdefault(group.name, {})[keep] = images.loss(model, steps) - base
    return curves


def losses_of(groups: Sequence[ChannelGroup], curves: Curves) -> list[np.ndarray]:
    """Return the loss of each group at every kept count, [channels + 1], convex and falling.

    Between the measured widths the logarithm of the loss is linear in that of the width, and below them it goes on;
    above them the loss is quadratic in the number of removed channels.
    """
    losses = []
    for group in groups:
        widths = np.array(sorted(curves[group.name]))
        found = np.array([max(curves[group.name][k], 1e-6) for k in widths])
        found = np.maximum.accumulate(found[::-1])[::-1]
        keep, most = np.arange(group.channels + 1.0), widths[-1]
        slope = min(-1.0, np.log(found[1] / found[0]) / np.log(widths[1] / widths[0])) if len(widths) > 1 else -1.0
        loss = np.exp(np.interp(np.log(np.maximum(keep, 0.5)), np.log(widths), np.log(found)))
        below, above = keep < widths[0], keep > most
        loss[below] = found[0] * (np.maximum(keep[below], 0.5) / widths[0]) ** slope
        loss[above] = found[-1] * ((group.channels - keep[above]) / (group.channels - most)) ** 2
        losses.append(mrs._lower_hull(loss[::-1])[::-1].copy())
    return losses


def pruned(arm: str, base: Model, data: DataBundle, analysis: Analysis, recipe: Recipe, curves: Curves) -> nn.Module:
    """Return the base, cut by the plan of an arm and repaired."""
    changes = {"allocation": "uniform" if arm == "uniform" else "mrs"}
    section = recipe.pruning.model_copy(update=changes | ({"mrs_exponent": 0} if arm.endswith("0") else {}))
    if curves:
        with mock.patch.object(mrs, "cut_losses", lambda problem, profile: losses_of(problem.groups, curves)):
            plan = make_plan(analysis, section)
    else:
        plan = make_plan(analysis, section)
    surgery = apply(copy.deepcopy(base.module).cpu(), plan, base.spec.blank_image())
    repair(surgery, base.module, data.train, recipe, choose_device(recipe.device))
    return surgery.model


def table(result: Mapping[str, Any]) -> str:
    """Return the Markdown table."""
    rows = result["rows"]
    cells = sorted({(row["ratio"], row["steps"]) for row in rows})
    lines = [
        f"# Loss of real cuts\n\n`benchmarks/cut_losses.py`: {result['arch']} on {result['data']}, robust accuracy "
        "in % under PGD-20 from one start on the margin on held-out training images, right after the repair and after "
        "steps of fine-tuning; beside it the paired difference to mrs, 95 % intervals over seeds and images.\n",
        "| MACs removed | steps | " + " | ".join(ARMS) + " |",
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
            texts.append(f"{values.mean():.1f} [{low:.1f}, {high:.1f}]{apart}, {len(values)} seeds")
        lines.append(f"| {100 * ratio:g} % | {steps} | " + " | ".join(texts) + " |")
    machines = sorted({f"{row['environment']['cpu']}, commit {row['environment']['commit'][:7]}" for row in rows})
    return "\n".join(lines) + f"\n\nMeasured on {'; '.join(machines)}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.9])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100], help="fine-tuning steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cut_losses.json")
    args = parser.parse_args()
    tune_allocator()
    base_recipe = load(args.recipe, {"data.name": args.data})
    data = open_data(base_recipe)
    base = open_model_for(args.model, data, base_recipe, None)
    device = choose_device(base_recipe.device)
    result: dict[str, Any] = {"arch": base.spec.arch, "data": data.name, "rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text(encoding="utf-8"))
    for seed in args.seeds:
        wanted = [(r, s, a) for r in args.ratios for s in args.steps for a in args.arms]
        have = {(row["ratio"], row["steps"], row["arm"]) for row in result["rows"] if row["seed"] == seed}
        if not set(wanted) - have:
            continue
        recipe = base_recipe.model_copy(update={"seed": seed})
        analysis = analyse(base.module, base.spec, data.train, recipe, device)
        clean, labels = random_images(data.train, IMAGES, 1000 + seed)
        drawn = torch.Generator().manual_seed(seed)
        with frozen_eval(base.module):
            adversarial = pgd(base.module, clean, labels, recipe.threat_model, steps=10, generator=drawn)
        images = Attacked(clean, adversarial, labels, recipe.threat_model)
        gram_images = torch.cat([adversarial, random_images(data.train, GRAM_IMAGES - IMAGES, seed)[0]])
        curves = {
            name: cut_curves(base.module, analysis, images, gram_images, steps)
            for name, steps in (("transferred", 0), ("attacked", STEPS)) if name in args.arms
        }  # fmt: skip
        for ratio, steps, arm in wanted:
            if (ratio, steps, arm) in have:
                continue
            section = recipe.pruning.model_copy(update={"ratio": ratio})
            settings = recipe.model_copy(update={"pruning": section})
            small = pruned(arm, base, data, analysis, settings, curves.get(arm, {}))
            if steps:
                tuned = recipe.finetune.model_copy(update={"epochs": 1})
                part = random_subset(data.train, steps * tuned.batch_size, seed)
                few = random_subset(data.train, 64, seed)  # held-out images choose no epoch, since they judge
                train(small, part, few, recipe.threat_model, tuned, seed=seed, device=device, teacher=base.module)
            score = score_on(small.cpu().eval(), data.validation, "held-out", data, settings, device)
            row = {"seed": seed, "ratio": ratio, "steps": steps, "arm": arm, "score": score, "environment": snapshot()}
            result["rows"].append({**row, "curves": curves.get(arm)})
            write_json(args.out, result)
            write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
