"""Accuracy after fine-tuning a pruned model: over time, by method in equal time, and by preset.

    python benchmarks/recovery.py curve demo --data cifar10 --minutes 0.5 2 5 20 --seeds 0 1 2
    python benchmarks/recovery.py methods demo --data cifar10 --minutes 4
    python benchmarks/recovery.py presets demo --data cifar10 --train-images 10000

The model is pruned once (`--ratio`; by default a quarter of the MACs is kept), and every method starts from it. The
exception is `from scratch`, which trains the pruned architecture from fresh weights with the settings of the recipe's
`training`, but without random crops and with a short weight average, since these suit runs of few epochs. `curve` and
`methods` give each method the same training time: steps of each kind are timed once, and every method trains on as many
images as fit, in as few equal epochs as possible, with its learning-rate schedule ending there. Every point of a curve
is therefore a separate run. Validation on held-out images is not counted. `presets` trains with the presets. Accuracy
is measured under PGD-20 on held-out training images and on test images. Results are written after every method and
seed, and the same command resumes with the missing ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from recovered import (
    ATTACK,
    by_seed,
    cut_base,
    difference,
    images_seen,
    interval,
    machine,
    right_images,
    scores,
)

from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console
from robust_prune.data.base import random_subset
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe import RECOVERIES, TrainSettings
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text
from robust_prune.training import trainer
from robust_prune.training.optimizer import peak_rate

METHODS: dict[str, dict[str, Any]] = {
    "N-FGSM": {"loss": "n_fgsm"},
    "N-FGSM, no average": {"loss": "n_fgsm", "ema_decay": 0.0},
    "N-FGSM, distilled": {"loss": "n_fgsm", "distillation": 0.5},
    "N-FGSM, AWP": {"loss": "n_fgsm", "awp": 0.005},
    "PGD-AT, 3 steps": {"loss": "pgd_at", "steps": 3},
    "PGD-AT": {"loss": "pgd_at"},
    "TRADES": {"loss": "trades"},
    "MART": {"loss": "mart"},
    "PGD-AT, distilled": {"loss": "pgd_at", "distillation": 0.5},
}
SCRATCH = "from scratch"
FORMER_ATTACK = "PGD-20, 1 random restart, cross-entropy"
"""Attack of results that do not name theirs."""
FORMER = "former default"
"""Default of fine-tuning before `recovery_settings.py` was run; its schedule is in `schedule_of`."""
CURVE: dict[str, dict[str, Any]] = {
    "default": {},
    FORMER: {"loss": "n_fgsm", "lr": 0.02, "warmup": 0.2, "ema_decay": 0.99, "crop_padding": 4},
    "distilled": {"distillation": 0.5},
    "PGD-AT, 3 steps": {"loss": "pgd_at", "steps": 3},
    SCRATCH: {"crop_padding": 0, "ema_decay": 0.99},
}
"""Changes of the recipe section `finetune` or, for training from scratch, `training`."""
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "curve": CURVE,
    "methods": METHODS,
    "presets": {str(name): changes for name, changes in RECOVERIES.items()},
}


@contextmanager
def schedule_of(name: str) -> Iterator[None]:
    """Train `FORMER` with its former schedule, whose truncated cosine ended at a twentieth of the peak rate."""
    if name != FORMER:
        yield
        return
    from timm.scheduler import CosineLRScheduler

    def former(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> CosineLRScheduler:
        return CosineLRScheduler(
            optimizer, t_initial=steps, warmup_t=int(settings.warmup * steps), warmup_prefix=True, t_in_epochs=False,
            warmup_lr_init=peak_rate(settings, steps) / 100,
        )  # fmt: skip

    with mock.patch.object(trainer, "make_schedule", former):
        yield


def run(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Train the missing methods, budgets and seeds, store each, and return all results."""
    changes = {
        "data.name": args.data, "device": args.device, "pruning.ratio": args.ratio,
        "evaluation.images": args.test_images,
    }  # fmt: skip
    recipe = load(args.recipe, changes)
    data = open_data(recipe)
    loaded = open_model_for(args.model, data, recipe, None)
    data = replace(data, train=random_subset(data.train, args.train_images, 0))
    result = stored | {"model": models_hash(loaded.module), "arch": loaded.spec.arch, "data": data.name}
    if stored and stored["model"] != result["model"]:
        raise SystemExit(f"{args.out} was made with another model. Move it away or use --out.")
    settings = {
        "threads": torch.get_num_threads(), "train_images": len(data.train), "ratio": args.ratio, "attack": ATTACK,
    }  # fmt: skip
    part: dict[str, Any] = result.setdefault(args.part, {**settings, "rows": []})
    if {key: part.get(key) for key in settings} != settings:
        raise SystemExit(f"{args.out} has {args.part} of other settings than {settings}. Move it away or use --out.")
    have = {(row["name"], row["minutes"], row["seed"]) for row in part["rows"]}
    ways, budgets = WAYS[args.part], [None] if args.part == "presets" else args.minutes
    todo = [(seed, minutes, name) for seed in args.seeds for minutes in budgets for name in args.only or ways]
    todo = [(seed, minutes, name) for seed, minutes, name in todo if (name, minutes, seed) not in have]
    if not todo:
        return result
    cut = cut_base(loaded, data, recipe)
    for seed, minutes, name in todo:
        seeded = recipe.model_copy(update={"seed": seed})
        base = cut.fresh(seed) if name == SCRATCH else cut
        tuning = (recipe.training if name == SCRATCH else recipe.finetune).model_copy(update=ways[name])
        epochs, count = tuning.epochs, len(data.train)
        if minutes is not None:
            epochs, count = images_seen(part, base, tuning, recipe, minutes)
        with schedule_of(name):
            small, seconds = base.trained(tuning.model_copy(update={"epochs": epochs}), seeded, count, data.validation)
        row = {"name": name, "minutes": minutes, "seed": seed, "epochs": epochs, "images": epochs * count}
        part["rows"].append(row | {"seconds": seconds} | scores(small, data, seeded, base.device))
        write_json(args.out, result | {"environment": snapshot()})
        console.print(f"seed {seed}, {name}: {row}, {seconds:.0f} s", markup=False)
    return json.loads(args.out.read_text(encoding="utf-8"))


def curve_table(result: dict[str, Any]) -> str:
    """Return a Markdown table with a column for each budget and two lines for each method: accuracy, difference."""
    value, environment = result["curve"], result["environment"]
    budgets = sorted({row["minutes"] for row in value["rows"]})
    first = value["rows"][0]["test"]
    text = [
        f"## Curve\n\n{result['arch']}, {100 * value['ratio']:g} % of the MACs removed, {value['train_images']:,} "
        f"training images of {result['data']}, {machine(value, environment)}; "
        f"robust accuracy under {value.get('attack', FORMER_ATTACK)} on {first['images']:,} test images, 95 % "
        "intervals over seeds and images; below it the paired difference to the default.\n",
        "| | " + " | ".join(f"{minutes:g} min" for minutes in budgets) + " |",
        "| --- |" + " ---: |" * len(budgets),
    ]
    for name in dict.fromkeys(row["name"] for row in value["rows"]):
        cells, apart = [], []
        for minutes in budgets:
            at = [row for row in value["rows"] if row["minutes"] == minutes]
            mine, default = (by_seed([r for r in at if r["name"] == n], "test") for n in (name, "default"))
            if not mine:
                cells.append("")
                apart.append("")
                continue
            values = 100 * np.stack(list(mine.values()))
            low, high = interval(values)
            cells.append(f"{values.mean():.1f} [{low:.1f}, {high:.1f}]")
            apart.append(difference(mine, default) if name != "default" else f"{len(mine)} seeds")
        text += [f"| {name} | {' | '.join(cells)} |", f"| | {' | '.join(apart)} |"]
    return "\n".join(text) + "\n"


def table(result: dict[str, Any], part: str) -> str:
    """Return a Markdown table of one part."""
    value, environment = result[part], result["environment"]
    title = f"Methods, {value['rows'][0]['minutes']:g} minutes each" if part == "methods" else "Presets"
    text = [
        f"## {title}\n\n{result['arch']}, a quarter of the MACs left, {value['train_images']:,} training images of "
        f"{result['data']}, {machine(value, environment)}; means over "
        "seeds; differences in test robust accuracy are paired by seed and image, with 95 % intervals over both.\n",
        "| | seeds | epochs | images seen | seconds | held-out robust | test: clean | robust | difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in value["rows"]:
        groups.setdefault(row["name"], []).append(row)
    reference = next(iter(groups.values()))
    for name, rows in groups.items():
        means = [100 * np.mean([right_images(r[split], which).mean() for r in rows]) for split, which in (
            ("held-out", "robust"), ("test", "clean"), ("test", "robust"),
        )]  # fmt: skip
        figures = " | ".join(f"{mean:.1f}" for mean in means)
        text.append(
            f"| {name} | {len(rows)} | {rows[0]['epochs']} | {np.mean([r['images'] for r in rows]):,.0f} | "
            f"{np.mean([r['seconds'] for r in rows]):.0f} | {figures} | {_difference(rows, reference)} |"
        )
    return "\n".join(text) + "\n"


def _difference(rows: list[dict[str, Any]], reference: list[dict[str, Any]], split: str = "test") -> str:
    return "" if rows is reference else difference(by_seed(rows, split), by_seed(reference, split))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(WAYS))
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2", help="threat model, fine-tuning and evaluation")
    parser.add_argument("--ratio", type=float, default=0.75, help="MACs removed")
    parser.add_argument("--minutes", type=float, nargs="+", default=[4.0], help="training time; not for presets")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the part's ways")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train-images", type=int, help="all by default")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recovery.json")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - set(WAYS.get(args.part, ())):
        parser.error(f"--only takes {', '.join(WAYS.get(args.part, ()))}; got {', '.join(sorted(unknown))}")
    tune_allocator()
    stored = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    result = run(args, stored)
    parts = [curve_table(result)] if "curve" in result else []
    parts += [table(result, part) for part in ("methods", "presets") if part in result]
    text = "# Recovery after the cut\n\n`benchmarks/recovery.py`\n\n" + "\n".join(parts)
    write_text(args.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
