"""Settings of fine-tuning for pruned networks, by time budget; no test images are used.

    python benchmarks/recovery_settings.py demo --data cifar10 --ratio 0.75 --minutes 0.5 2 5 --knobs lr ema_decay

The model is pruned once by the method of the recipe. Each setting gets the same training time: steps are timed first,
and training uses as many images as fit, in as few equal epochs as possible, with the learning-rate schedule ending
there. Of 3,000 held-out training images, the first 500 select the epoch, and the others score the settings under
PGD-20.

The protocol was fixed before the first run: seeds 0 and 1; at every budget, one setting at a time is changed from
`CENTRE`, the learning rate first; another value is adopted if both seeds agree and the paired interval over seeds and
images excludes 0; there is one pass over the settings. The centre is from a pilot (`benchmarks/README.md`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recovered import Base, by_seed, cut_base, difference, images_seen, machine, score_on

from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console
from robust_prune.data.base import Subset
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text

CENTRE: dict[str, Any] = {
    "loss": "n_fgsm", "lr": 0.08, "crop_padding": 0, "warmup": 0.15, "ema_decay": 0.99, "batch_size": 128,
    "label_smoothing": 0.1, "weight_decay": 5e-4, "distillation": 0.0,
}  # fmt: skip
KNOBS: dict[str, tuple[Any, ...]] = {
    "lr": (0.02, 0.05, 0.12, 0.2),
    "crop_padding": (2, 4),
    "batch_size": (32, 64, 256),
    "warmup": (0.05, 0.3),
    "label_smoothing": (0.0, 0.2),
    "weight_decay": (1e-4, 1e-3),
    "ema_decay": (0.0, 0.995),
    "distillation": (0.5,),
    "repair": ("batchnorm", "none"),
}
"""Settings of fine-tuning and their alternative values; `repair` is the repair before fine-tuning."""
CHOOSE_IMAGES, HELD_OUT_IMAGES = 500, 3000


def tunings(knobs: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return repair and fine-tuning settings by name: the centre, and each setting changed alone."""
    found: dict[str, tuple[str, dict[str, Any]]] = {"centre": ("least_squares", CENTRE)}
    for knob in knobs:
        for value in KNOBS[knob]:
            if knob == "repair":
                found[f"{knob} {value}"] = (value, CENTRE)
            else:
                found[f"{knob} {value:g}"] = ("least_squares", CENTRE | {knob: value})
    return found


def measure(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Train the missing settings, store each, and return all results."""
    changes = {
        "data.name": args.data, "data.validation": HELD_OUT_IMAGES, "device": args.device,
        "pruning.ratio": args.ratio, "finetune.validation_images": CHOOSE_IMAGES,
    }  # fmt: skip
    recipe = load(args.recipe, changes)
    data = open_data(recipe)
    loaded = open_model_for(args.model, data, recipe, None)
    chosen_on = Subset(data.validation, torch.arange(CHOOSE_IMAGES))
    scored_on = Subset(data.validation, torch.arange(CHOOSE_IMAGES, len(data.validation)))
    result = stored | {"model": models_hash(loaded.module), "arch": loaded.spec.arch, "data": data.name}
    if stored and stored["model"] != result["model"]:
        raise SystemExit(f"{args.out} was made with another model. Move it away or use --out.")
    empty: dict[str, Any] = {"threads": torch.get_num_threads(), "rows": []}
    part: dict[str, Any] = result.setdefault("tune", empty)
    have = {(row["ratio"], row["minutes"], row["name"], row["seed"]) for row in part["rows"]}
    ways = tunings(args.knobs)
    todo = [(seed, minutes, name) for seed in args.seeds for minutes in args.minutes for name in ways]
    bases: dict[str, Base] = {}
    for seed, minutes, name in todo:
        if (args.ratio, minutes, name, seed) in have:
            continue
        repair, changes = ways[name]
        if repair not in bases:
            section = recipe.pruning.model_copy(update={"repair": repair})
            bases[repair] = cut_base(loaded, data, recipe.model_copy(update={"pruning": section}))
        base, settings = bases[repair], recipe.finetune.model_copy(update=changes)
        epochs, count = images_seen(part, base, settings, recipe, minutes)
        settings, seeded = settings.model_copy(update={"epochs": epochs}), recipe.model_copy(update={"seed": seed})
        small, seconds = base.trained(settings, seeded, count, chosen_on)
        row = {"ratio": args.ratio, "minutes": minutes, "name": name, "seed": seed, "epochs": epochs}
        row |= {"images": epochs * count, "seconds": seconds}
        row |= {"held-out": score_on(small, scored_on, "validation", data, seeded, base.device)}
        part["rows"].append(row)
        write_json(args.out, result | {"environment": snapshot()})
        clean, robust = (100 * by_seed([row], "held-out", which)[seed].mean() for which in ("clean", "robust"))
        console.print(f"seed {seed}, {minutes:g} min, {name}: {clean:.1f} / {robust:.1f} %", markup=False)
    return json.loads(args.out.read_text(encoding="utf-8"))


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of the centre and of the change by each value, by ratio and budget."""
    value, environment = result["tune"], result["environment"]
    images = value["rows"][0]["held-out"]["images"]
    text = [
        f"# Settings of recovery\n\n`benchmarks/recovery_settings.py`: {result['arch']} on {result['data']}, "
        f"{machine(value, environment)}; PGD-20 on {images:,} held-out "
        "training images that chose nothing. One setting at a time is moved from the centre ("
        f"{', '.join(f'{k} {v}' for k, v in CENTRE.items())}); differences in robust accuracy are paired image by "
        "image, 95 % intervals over seeds and images.\n",
        "| MACs removed | minutes | images seen | settings | seeds | clean | robust | difference |",
        "| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for ratio, minutes in sorted({(row["ratio"], row["minutes"]) for row in value["rows"]}):
        mine = [row for row in value["rows"] if (row["ratio"], row["minutes"]) == (ratio, minutes)]
        centre = by_seed([row for row in mine if row["name"] == "centre"], "held-out")
        for name in dict.fromkeys(row["name"] for row in mine):
            rows = [row for row in mine if row["name"] == name]
            clean, robust = (by_seed(rows, "held-out", which) for which in ("clean", "robust"))
            means = " | ".join(f"{100 * np.mean([v.mean() for v in found.values()]):.1f}" for found in (clean, robust))
            apart = difference(robust, centre) if name != "centre" else ""
            seen = f"{rows[0]['images']:,}"
            text.append(f"| {100 * ratio:g} % | {minutes:g} | {seen} | {name} | {len(rows)} | {means} | {apart} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2", help="threat model, cut and fine-tuning")
    parser.add_argument("--ratio", type=float, default=0.75, help="MACs removed")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0])
    parser.add_argument("--knobs", nargs="+", choices=list(KNOBS), default=list(KNOBS), help="settings to move")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--report", action="store_true", help="draw the table of what is stored, measure nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recovery_settings.json")
    args = parser.parse_args()
    tune_allocator()
    stored = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    text = table(stored if args.report else measure(args, stored))
    write_text(args.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
