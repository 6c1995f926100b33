"""Speed and accuracy of the training loop compared with the published ones, and its cost for each image.

    python benchmarks/training.py speed demo --data cifar10
    python benchmarks/training.py accuracy demo --data cifar10
    python benchmarks/training.py cost demo --data cifar10

`speed` times optimisation steps of several loops on real images, in a random order in each round. Ours uses the
precision and layout that `train` selects on this machine, frozen parameters and input gradients alone in the attack,
and one computation of the clean distribution; on a GPU it also runs with `torch.compile`. The published loops
(`plain_loops.py`) run in fp32 and contiguous layout, and again with channels_last and, on a GPU, with TF32. The ratio
to the latter excludes these two simple settings. Images per second are medians over rounds; ratios have 95 % bootstrap
intervals over rounds.

`accuracy` prunes a model to a quarter of its MACs (uniformly, by magnitude, without repair) and trains it with both
loops on the same batches in the same order, with a learning rate that decays to zero. It compares robust accuracy on
test images, paired by image.

`cost` times optimisation steps of PGD-AT for several numbers of attack steps, shares of the MACs and batch sizes, in a
random order in each round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from plain_loops import PLAIN_STEPS
from recovered import paired, right_images, scores
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel
from robust_prune.budget.analysis import Analysis, analyse
from robust_prune.budget.cost import cost_model
from robust_prune.budget.measured import Measured
from robust_prune.budget.plan import make_plan
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console
from robust_prune.data.base import DataBundle
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.device import choose_device
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.models.layout import tf32
from robust_prune.ranking.importance import channel_scores
from robust_prune.recipe import PruningSection, Recipe, TrainSettings
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text
from robust_prune.structure.groups import find_groups
from robust_prune.surgery.apply import apply
from robust_prune.training import compilation
from robust_prune.training.losses import Batch, make_loss
from robust_prune.training.optimizer import FULL_RATE, FULL_RATE_STEPS, decay_groups, make_optimizer
from robust_prune.training.precision import Precision, choose_precision

RESAMPLES = 4000
LOOPS = ("ours", "plain")
COMPILED, TUNED = "ours, compiled", "plain, tuned"
Setting = TypeVar("Setting")

# --- speed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A model, its optimizer, and a function that takes one optimisation step on a batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor], None]


def our_loop(
    dense: nn.Module, x: Tensor, threat: ThreatModel, settings: TrainSettings, compiled: bool = False
) -> tuple[Loop, Precision]:
    """Return the loop of `train` for batches like `x`, without augmentation and averaging, on a copy of `dense`."""
    model = copy.deepcopy(dense).to(x.device)
    optimizer = make_optimizer(model, settings, FULL_RATE_STEPS, x.device)
    loss, precision = make_loss(settings), choose_precision(model, x)
    precision.arrange(model)
    generator = torch.Generator(x.device).manual_seed(0)
    run = compilation.compiled(model) if compiled else model

    def step(x: Tensor, y: Tensor) -> None:
        run.train()
        images = x.contiguous(memory_format=precision.memory_format)
        with tf32(True), torch.autocast(x.device.type, torch.bfloat16, enabled=precision.bf16):
            result = loss(run, Batch(images, y, threat, generator, run))
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        optimizer.step()

    return Loop(model, optimizer, step), replace(precision, compiled=compiled)


def plain_loop(dense: nn.Module, x: Tensor, threat: ThreatModel, settings: TrainSettings, tuned: bool = False) -> Loop:
    """Return the published loop on a copy of `dense`; `tuned` uses TF32 and channels_last."""
    model = copy.deepcopy(dense).to(x.device)
    layout = torch.channels_last if tuned else torch.contiguous_format
    to: Any = model.to
    to(memory_format=layout)
    groups = decay_groups(model, settings.weight_decay)
    optimizer = torch.optim.SGD(groups, FULL_RATE, settings.momentum, nesterov=True)

    def step(x: Tensor, y: Tensor) -> None:
        with tf32(tuned):
            PLAIN_STEPS[settings.loss](model, optimizer, x.contiguous(memory_format=layout), y, threat, settings)

    return Loop(model, optimizer, step)


def in_turn(
    loops: dict[Setting, Callable[[], None]], rounds: int, shuffler: random.Random, device: str
) -> dict[Setting, list[float]]:
    """Return the seconds of each loop in each round, in random order, after one round of warm-up."""
    seconds: dict[Setting, list[float]] = {setting: [] for setting in loops}
    for round_number in range(rounds + 1):
        order = list(loops)
        shuffler.shuffle(order)
        for setting in order:
            begin = time.perf_counter()
            loops[setting]()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_number:
                seconds[setting].append(time.perf_counter() - begin)
    return seconds


def speed(
    dense: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    settings: TrainSettings,
    rounds: int,
    with_compiled: bool = False,
) -> dict[str, Any]:
    """Return the seconds of every round by loop, for the loss of `settings`, on one batch [N, C, H, W]."""
    settings = settings.model_copy(update={"lr": 0.001})
    ours, precision = our_loop(dense, x, threat, settings)
    loops = {"ours": ours, "plain": plain_loop(dense, x, threat, settings)}
    loops[TUNED] = plain_loop(dense, x, threat, settings, tuned=True)
    if with_compiled:
        loops[COMPILED] = our_loop(dense, x, threat, settings, compiled=True)[0]
    once = {name: partial(loop.step, x, y) for name, loop in loops.items()}
    seconds = in_turn(once, rounds, random.Random(0), x.device.type)
    return {"seconds": seconds, "precision": str(precision)}


def measure_speed(
    args: argparse.Namespace, recipe: Recipe, data: DataBundle, dense: nn.Module, device: str
) -> dict[str, Any]:
    """Return `speed` for every published loss."""
    threat, found = recipe.threat_model, {}
    x, y = data.train.get(torch.arange(args.batch_size))
    x, y = x.to(device).float() / 255, y.to(device)
    for name in PLAIN_STEPS:
        settings = TrainSettings(loss=name, steps=args.steps)
        found[name] = speed(dense, x, y, threat, settings, args.rounds, with_compiled=device == "cuda")
        seconds = found[name]["seconds"]
        console.print(f"{name}: {np.median(seconds['plain']) / np.median(seconds['ours']):.2f} times", markup=False)
    return {"batch": args.batch_size, "steps": args.steps, "threads": torch.get_num_threads(), "losses": found}


def speed_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of the result of `measure_speed`."""
    value, environment = result["speed"], result["environment"]
    text = [
        f"## Speed\n\n{result['arch']}, batches of {value['batch']} images of {result['data']}, {value['steps']} "
        f"attack steps in pgd_at and trades, {value['threads']} threads of {environment['cpu']} "
        f"({environment['device']}), torch {environment['versions']['torch']}. Plain: the authors' loops in fp32; "
        "tuned: the same in channels_last, TF32 allowed. Ratios of medians, 95 % intervals over rounds.\n",
        "| loss | loop | images/s | plain / this | tuned plain / this | rounds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in value["losses"].items():
        times = {loop: np.array(seconds) for loop, seconds in found["seconds"].items()}
        for loop, taken in times.items():
            label = f"{loop} ({found['precision']})" if loop == "ours" else loop
            ratios = [_ratio(times[against], taken) if loop != against else "" for against in ("plain", TUNED)]
            text.append(
                f"| {name} | {label} | {value['batch'] / np.median(taken):,.0f} | {' | '.join(ratios)} | {len(taken)} |"
            )
    return "\n".join(text) + "\n"


def _ratio(base: np.ndarray, arm: np.ndarray) -> str:
    picks = np.random.default_rng(0).integers(0, len(arm), (RESAMPLES, len(arm)))
    low, high = np.percentile(np.median(base[picks], 1) / np.median(arm[picks], 1), (2.5, 97.5))
    return f"{np.median(base) / np.median(arm):.2f} [{low:.2f}, {high:.2f}]"


# --- accuracy ----------------------------------------------------------------------------------------------------

PEAK, WARMUP = 0.02, 0.15  # peak learning rate, and share of the steps for warm-up


def accuracy(
    args: argparse.Namespace, recipe: Recipe, data: DataBundle, dense: nn.Module, spec: Any, device: str
) -> dict[str, Any]:
    """Return which test images the model of each loop classifies correctly, by loss."""
    example = spec.blank_image()
    search = find_groups(dense.cpu(), example)
    cost, magnitudes = cost_model(dense, example, search.groups), channel_scores(dense, search.groups, "magnitude")
    plan = make_plan(
        Analysis(search, cost, None, magnitudes),
        PruningSection(ratio=0.75, allocation="uniform", criterion="magnitude"),
    )
    small = apply(dense, plan, example).model
    evaluation = recipe.evaluation.model_copy(update={"images": args.test_images})
    recipe = recipe.model_copy(update={"evaluation": evaluation})
    x, y = data.train.get(torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: args.images])
    x, y = x.to(device).float() / 255, y.to(device)
    batches = list(zip(x.split(args.batch_size), y.split(args.batch_size), strict=True))
    found: dict[str, Any] = {}
    for name in ("pgd_at", "trades"):
        settings = TrainSettings(loss=name, steps=args.steps)
        threat = recipe.threat_model
        ours, precision = our_loop(small, batches[0][0], threat, settings)
        loops = {"ours": ours, "plain": plain_loop(small, batches[0][0], threat, settings)}
        torch.manual_seed(0)
        for number, (images, labels) in enumerate(batches):
            done = (number + 1) / len(batches)
            for loop in loops.values():
                for group in loop.optimizer.param_groups:
                    group["lr"] = PEAK * min(done / WARMUP, (1 - done) / (1 - WARMUP))
                loop.step(images, labels)
        found[name] = {
            loop: scores(part.model.cpu().eval(), data, recipe, device)["test"] for loop, part in loops.items()
        } | {"precision": str(precision)}
        console.print(f"{name}: trained with both loops", markup=False)
    return {"images": len(x), "batch": args.batch_size, "steps": args.steps, "losses": found}


def accuracy_table(result: dict[str, Any]) -> str:
    value = result["accuracy"]
    some = next(iter(value["losses"].values()))["ours"]["images"]
    text = [
        f"## Accuracy\n\n{result['arch']}, a quarter of the MACs left, trained on {value['images']:,} images of "
        f"{result['data']}, {value['steps']} steps of attack; PGD-20 on {some:,} test images; 95 % intervals of the "
        "paired difference are over images.\n",
        "| loss | ours: clean | robust | plain loop: clean | robust | ours - plain, robust |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in value["losses"].items():
        right = {(loop, which): right_images(found[loop], which) for loop in LOOPS for which in ("clean", "robust")}
        figures = " | ".join(f"{100 * right[key].mean():.1f}" for key in right)
        text.append(f"| {name} | {figures} | {paired(right['ours', 'robust'], right['plain', 'robust'])} |")
    return "\n".join(text) + "\n"


# --- cost --------------------------------------------------------------------------------------------------------

ATTACK_STEPS, RATIOS, BATCHES = (0, 1, 3, 10), (0.5, 0.75, 0.9), (32, 128, 512)


def cost(
    args: argparse.Namespace, recipe: Recipe, data: DataBundle, dense: nn.Module, spec: Any, device: str
) -> dict[str, Any]:
    """Return the seconds of every round by attack steps (0 is clean training), kept MACs and batch size."""
    if len(data.train) < max(BATCHES):
        raise SystemExit(f"cost takes batches of up to {max(BATCHES)} images, {data.name} has {len(data.train)}.")
    threat = recipe.threat_model
    analysis = analyse(Measured(dense, spec, data.train, recipe, device))
    models, kept = {0.0: dense}, {0.0: 1.0}
    for ratio in RATIOS:
        plan = make_plan(analysis, recipe.pruning.model_copy(update={"ratio": ratio}))
        models[ratio] = apply(dense.cpu(), plan, spec.blank_image()).model
        kept[ratio] = plan.macs_after / plan.macs_before
    settings = dict.fromkeys(
        [(steps, 0.0, args.batch_size) for steps in ATTACK_STEPS]
        + [(3, ratio, args.batch_size) for ratio in models]
        + [(3, 0.0, batch) for batch in BATCHES]
    )
    loops = {}
    for steps, ratio, batch in settings:
        x, y = data.train.get(torch.arange(batch))
        chosen = TrainSettings(loss="pgd_at" if steps else "clean", steps=max(steps, 1))
        x, y = x.to(device).float() / 255, y.to(device)
        ours, _ = our_loop(models[ratio], x, threat, chosen)
        loops[steps, ratio, batch] = partial(ours.step, x, y)
    seconds = in_turn(loops, args.rounds, random.Random(0), device)
    rows = [
        {"steps": steps, "macs_kept": kept[ratio], "batch": batch, "seconds": found}
        for (steps, ratio, batch), found in seconds.items()
    ]
    return {"threads": torch.get_num_threads(), "rows": rows}


def cost_table(result: dict[str, Any]) -> str:
    value, environment = result["cost"], result["environment"]
    text = [
        f"## Cost of an image\n\n{result['arch']}, PGD-AT on {result['data']}, {value['threads']} threads of "
        f"{environment['cpu']} ({environment['device']}), torch {environment['versions']['torch']}; medians and range "
        f"over rounds: {len(value['rows'][0]['seconds'])}.\n",
        "| attack steps | MACs left | batch | ms an image | per forward and backward |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in value["rows"]:
        each = 1000 * np.array(row["seconds"]) / row["batch"]
        middle = float(np.median(each))
        text.append(
            f"| {row['steps']} | {100 * row['macs_kept']:.0f} % | {row['batch']} | "
            f"{middle:.2f} [{each.min():.2f}, {each.max():.2f}] | {middle / (row['steps'] + 1):.2f} |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "accuracy", "cost"])
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2", help="threat model and cut")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=int, default=5000, help="accuracy: to train on")
    parser.add_argument("--test-images", type=int, default=2000, help="accuracy: to compare on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    args = parser.parse_args()
    tune_allocator()
    recipe = load(args.recipe, {"data.name": args.data, "device": args.device})
    data = open_data(recipe)
    loaded = open_model_for(args.model, data, recipe, None)
    device = choose_device(recipe.device)
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if result.get("model", models_hash(loaded.module)) != models_hash(loaded.module):
        raise SystemExit(f"{args.out} was made with another model. Move it away or use --out.")
    result |= {"model": models_hash(loaded.module), "arch": loaded.spec.arch, "data": data.name}

    def save(value: dict[str, Any]) -> None:
        write_json(args.out, result | {args.part: value, "environment": snapshot()})

    if args.part == "speed":
        save(measure_speed(args, recipe, data, loaded.module, device))
    elif args.part == "accuracy":
        save(accuracy(args, recipe, data, loaded.module, loaded.spec, device))
    else:
        save(cost(args, recipe, data, loaded.module, loaded.spec, device))
    result = json.loads(args.out.read_text(encoding="utf-8"))
    tables = {"speed": speed_table, "accuracy": accuracy_table, "cost": cost_table}
    parts = [table(result) for part, table in tables.items() if part in result]
    text = "# Training\n\n`benchmarks/training.py`\n\n" + "\n".join(parts)
    write_text(args.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
