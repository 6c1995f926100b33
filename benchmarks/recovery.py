"""What each fine-tuning method recovers in the same time, which settings suit a cut network, and what presets do.

    python benchmarks/recovery.py tune demo --data cifar10 --ratio 0.75 --minutes 2 --knobs lr ema_decay
    python benchmarks/recovery.py methods demo --data cifar10 --minutes 4
    python benchmarks/recovery.py presets demo --data cifar10 --train-images 10000

The model is cut once (`--ratio`, a quarter of the MACs left by default), and every way begins with that. `tune` and
`methods` give each the same training time: some steps are timed first, and it then trains on as many images as fit, in
equal epochs as few as the data allow, with its schedule ending there. Scoring the epochs on held-out images is not
counted. `presets` trains as the presets say. Accuracy is PGD-20's, and differences to the first row's are paired image
by image. Results are written after every way and seed; the same command goes on with what is missing.

`tune` reads no test image: of 3,000 training images that are held out, the first 500 choose among epochs and the others
score the settings. Written down before its first run: seeds 0 and 1; one setting at a time is moved away from `CENTRE`,
the rate first, at every budget; another value is taken where both seeds agree and the paired interval over images
leaves 0 out; one pass over the settings, and no second.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from robust_prune import stages
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console
from robust_prune.data.base import DataBundle, ImageSet, Subset, first, random_subset
from robust_prune.environment import snapshot
from robust_prune.evaluation.evaluate import evaluate
from robust_prune.evaluation.hashing import models_hash
from robust_prune.machine import tune_allocator
from robust_prune.models.layout import has_fast_bf16
from robust_prune.models.spec import ModelSpec
from robust_prune.pruning.surgery import apply
from robust_prune.recipe import RECOVERIES, Recipe, TrainSettings, load
from robust_prune.run_dir import write_json, write_text
from robust_prune.training.trainer import train

TIMED_STEPS = 20
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
CENTRE: dict[str, Any] = {
    "loss": "n_fgsm", "lr": 0.08, "warmup": 0.15, "ema_decay": 0.99, "batch_size": 128, "label_smoothing": 0.1,
    "weight_decay": 5e-4,
}  # fmt: skip
KNOBS: dict[str, tuple[Any, ...]] = {
    "lr": (0.02, 0.05, 0.12, 0.2),
    "ema_decay": (0.0, 0.98, 0.995),
    "warmup": (0.05, 0.3),
    "batch_size": (64, 256),
    "label_smoothing": (0.0,),
    "weight_decay": (1e-4, 1e-3),
}
"""Settings of fine-tuning, and the values that are tried beside that of `CENTRE`."""
CHOOSE_IMAGES, HELD_OUT_IMAGES = 500, 3000
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "methods": METHODS,
    "presets": {str(name): changes for name, changes in RECOVERIES.items()},
}


@dataclass(frozen=True)
class Base:
    """The cut model that every way begins with, its dense parent, the images and the device."""

    cut: nn.Module
    dense: nn.Module
    data: DataBundle
    device: str

    def trained(
        self, settings: TrainSettings, recipe: Recipe, count: int, chosen_on: ImageSet
    ) -> tuple[nn.Module, float]:
        """A copy, trained on `count` images, and the seconds that the epochs themselves took."""
        small = copy.deepcopy(self.cut)
        result = train(
            small, random_subset(self.data.train, count, recipe.seed), chosen_on, stages.threat_of(recipe), settings,
            seed=recipe.seed, device=self.device, teacher=self.dense,
        )  # fmt: skip
        return small.cpu().eval(), sum(record.seconds for record in result.history)

    def affordable(self, settings: TrainSettings, recipe: Recipe, minutes: float) -> tuple[int, int]:
        """Epochs, and images in each, that take `minutes`."""
        timed, none = TIMED_STEPS * settings.batch_size, first(self.data.validation, 0)
        seconds = self.trained(settings.model_copy(update={"epochs": 1}), recipe, timed, none)[1]
        images = int(60 * minutes * timed / seconds)
        epochs = math.ceil(images / len(self.data.train))
        return epochs, images // epochs


def scores(small: nn.Module, data: DataBundle, recipe: Recipe, device: str) -> dict[str, Any]:
    """Which images are right, clean and attacked, by split; as packed bits."""
    splits = {"held-out": data.validation, "test": first(data.test, recipe.evaluation.images)}
    return {split: score_on(small, images, split, data, recipe, device) for split, images in splits.items()}


def score_on(
    small: nn.Module, images: ImageSet, split: str, data: DataBundle, recipe: Recipe, device: str
) -> dict[str, Any]:
    """Which of `images` are right, clean and under PGD-20 from one start, as packed bits."""
    with TemporaryDirectory() as folder:
        state = Path(folder) / "state.npz"
        evaluate(
            small, images, stages.threat_of(recipe), model_name="recovered", data_name=data.name, split=split,
            restarts=1, device=device, precision="bf16" if has_fast_bf16(torch.device(device)) else "fp32",
            state_path=state,
        )  # fmt: skip
        with np.load(state) as found:
            bits = {name: np.packbits(found[name]).tobytes().hex() for name in ("clean", "robust")}
    return {"images": len(images), **bits}


def tunings(knobs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The centre, and each setting moved away from it alone, by a name for tables."""
    found = {"centre": CENTRE}
    for knob in knobs:
        found |= {f"{knob} {value:g}": CENTRE | {knob: value} for value in KNOBS[knob]}
    return found


def cut_base(args: argparse.Namespace, data: DataBundle, dense: nn.Module, spec: ModelSpec, recipe: Recipe) -> Base:
    """The model cut by the default method and repaired."""
    device = stages.device_of(recipe)
    analysis = stages.analyse(dense, spec, data.train, recipe, device)
    surgery = apply(dense.cpu(), stages.plan_cut(analysis, recipe.pruning), stages.blank_image(spec))
    stages.compensate(surgery, dense, data.train, recipe, device)
    return Base(surgery.model, dense, data, device)


def tune(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Settings against each other on held-out images, at one ratio and for several budgets; stored rows first."""
    recipe = load(
        args.recipe,
        {
            "data.name": args.data, "data.validation": HELD_OUT_IMAGES, "device": args.device,
            "pruning.ratio": args.ratio, "finetune.validation_images": CHOOSE_IMAGES,
        },
    )  # fmt: skip
    data = open_data(recipe)
    loaded = open_model_for(args.model, data, recipe, None)
    scored_on = Subset(data.validation, torch.arange(CHOOSE_IMAGES, len(data.validation)))
    result = stored | {"model": models_hash(loaded.model), "arch": loaded.spec.arch, "data": data.name}
    part: dict[str, Any] = result.setdefault(
        "tune", {"threads": torch.get_num_threads(), "steps_a_minute": {}, "rows": []}
    )
    have = {(row["ratio"], row["minutes"], row["name"], row["seed"]) for row in part["rows"]}
    todo = [
        (seed, minutes, name)
        for seed in args.seeds
        for minutes in args.minutes
        for name in tunings(args.knobs)
        if (args.ratio, minutes, name, seed) not in have
    ]
    base = None
    for seed, minutes, name in todo:
        base = base or cut_base(args, data, loaded.model, loaded.spec, recipe)
        seeded = recipe.model_copy(update={"seed": seed})
        settings = recipe.finetune.model_copy(update=tunings(args.knobs)[name])
        timed = f"{args.ratio:g} {settings.loss} {settings.batch_size}"
        if timed not in part["steps_a_minute"]:
            epochs, count = base.affordable(settings, seeded, 1.0)
            part["steps_a_minute"][timed] = epochs * count / settings.batch_size
        images = int(minutes * part["steps_a_minute"][timed] * settings.batch_size)
        epochs = math.ceil(images / len(data.train))
        tuned, chosen = settings.model_copy(update={"epochs": epochs}), first(data.validation, CHOOSE_IMAGES)
        small, seconds = base.trained(tuned, seeded, images // epochs, chosen)
        row = {"ratio": args.ratio, "minutes": minutes, "name": name, "seed": seed, "epochs": epochs, "images": images}
        row |= {"seconds": seconds, "held-out": score_on(small, scored_on, "validation", data, seeded, base.device)}
        part["rows"].append(row)
        write_json(args.out, result | {"environment": snapshot()})
        share = {which: 100 * right_images(row["held-out"], which).mean() for which in ("clean", "robust")}
        console.print(
            f"seed {seed}, {minutes:g} min, {name}: {share['clean']:.1f} / {share['robust']:.1f} %", markup=False
        )
    return json.loads(args.out.read_text(encoding="utf-8"))


def tune_table(result: dict[str, Any]) -> str:
    """Markdown: the centre and what each other value changes, by ratio and budget."""
    value, environment = result["tune"], result["environment"]
    images = value["rows"][0]["held-out"]["images"]
    text = [
        f"## Settings\n\n{result['arch']} on {result['data']}, {value['threads']} threads of {environment['cpu']} "
        f"({environment['device']}); PGD-20 on {images:,} held-out training images that chose nothing. One setting "
        f"at a time is moved from the centre ({', '.join(f'{k} {v}' for k, v in CENTRE.items())}); differences in "
        "robust accuracy are paired image by image, 95 % intervals over images of the mean over seeds.\n",
        "| MACs removed | minutes | settings | seeds | clean | robust | difference |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    cells = sorted({(row["ratio"], row["minutes"]) for row in value["rows"]})
    for ratio, minutes in cells:
        mine = [row for row in value["rows"] if (row["ratio"], row["minutes"]) == (ratio, minutes)]
        centre = [row for row in mine if row["name"] == "centre"]
        for name in dict.fromkeys(row["name"] for row in mine):
            rows = [row for row in mine if row["name"] == name]
            clean, robust = (
                100 * np.mean([right_images(r["held-out"], w).mean() for r in rows]) for w in ("clean", "robust")
            )
            difference = _difference(rows, centre, "held-out") if name != "centre" else ""
            figures = f"{len(rows)} | {clean:.1f} | {robust:.1f} | {difference}"
            text.append(f"| {100 * ratio:g} % | {minutes:g} | {name} | {figures} |")
    return "\n".join(text) + "\n"


def run(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """All ways and seeds, stored ones first."""
    recipe = load(
        args.recipe,
        {
            "data.name": args.data,
            "device": args.device,
            "pruning.ratio": args.ratio,
            "evaluation.images": args.test_images,
        },
    )
    data = open_data(recipe)
    loaded = open_model_for(args.model, data, recipe, None)
    data = replace(data, train=random_subset(data.train, args.train_images, 0))
    device, dense = stages.device_of(recipe), loaded.model
    result = stored | {"model": models_hash(dense), "arch": loaded.spec.arch, "data": data.name}
    if stored and stored["model"] != result["model"]:
        raise SystemExit(f"{args.out} was made with another model. Move it away or use --out.")
    settings = {"threads": torch.get_num_threads(), "train_images": len(data.train)}
    if args.part == "methods":
        settings["minutes"] = args.minutes[0]
    part: dict[str, Any] = result.setdefault(args.part, {**settings, "rows": []})
    if {key: part[key] for key in settings} != settings:
        raise SystemExit(f"{args.out} has {args.part} of other settings than {settings}. Move it away or use --out.")
    have = {(row["name"], row["seed"]) for row in part["rows"]}
    ways = WAYS[args.part]
    todo = [(seed, name) for seed in args.seeds for name in args.only or ways if (name, seed) not in have]
    if not todo:
        return result
    base = cut_base(args, data, dense, loaded.spec, recipe)
    for seed, name in todo:
        seeded = recipe.model_copy(update={"seed": seed})
        tuning = recipe.finetune.model_copy(update=ways[name])
        epochs, count = tuning.epochs, len(data.train)
        if args.part == "methods":
            epochs, count = base.affordable(tuning, seeded, args.minutes[0])
        small, seconds = base.trained(
            tuning.model_copy(update={"epochs": epochs}), seeded, count, data.validation
        )  # fmt: skip
        row = {"name": name, "seed": seed, "epochs": epochs, "images": epochs * count, "seconds": seconds}
        part["rows"].append(row | scores(small, data, seeded, device))
        write_json(args.out, result | {"environment": snapshot()})
        console.print(f"seed {seed}, {name}: {row}", markup=False)
    return json.loads(args.out.read_text(encoding="utf-8"))


def right_images(scored: dict[str, Any], which: str) -> np.ndarray:
    """One for each image that is right, of what `scores` found on one split."""
    bits = np.frombuffer(bytes.fromhex(scored[which]), np.uint8)
    return np.unpackbits(bits)[: scored["images"]].astype(float)


def paired(mine: np.ndarray, theirs: np.ndarray) -> str:
    """The difference in points with its 95 % interval over images."""
    each = 100 * (mine - theirs)
    half = 1.96 * each.std(ddof=1) / math.sqrt(len(each))
    return f"{each.mean():+.1f} [{each.mean() - half:+.1f}, {each.mean() + half:+.1f}]"


def table(result: dict[str, Any], part: str) -> str:
    """Markdown of one part."""
    value, environment = result[part], result["environment"]
    title = f"Methods, {value['minutes']:g} minutes each" if part == "methods" else "Presets"
    text = [
        f"## {title}\n\n{result['arch']}, a quarter of the MACs left, {value['train_images']:,} training images of "
        f"{result['data']}, {value['threads']} threads of {environment['cpu']} ({environment['device']}); means over "
        "seeds; 95 % intervals of the paired difference in test robust accuracy are over images.\n",
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
    if rows is reference:
        return ""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in reference}
    mine, theirs = (
        np.mean([right_images(row[split], "robust") for row in found if row["seed"] in seeds], 0)
        for found in (rows, reference)
    )
    return paired(mine, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tune", *WAYS])
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2", help="threat model, fine-tuning and evaluation")
    parser.add_argument("--ratio", type=float, default=0.75, help="MACs removed")
    parser.add_argument("--minutes", type=float, nargs="+", default=[4.0], help="tune: several; methods: one")
    parser.add_argument("--knobs", nargs="+", choices=list(KNOBS), default=list(KNOBS), help="tune: settings to move")
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
    result = (tune if args.part == "tune" else run)(args, stored)
    parts = [tune_table(result)] if "tune" in result else []
    parts += [table(result, part) for part in WAYS if part in result]
    text = "# Recovery after the cut\n\n`benchmarks/recovery.py`\n\n" + "\n".join(parts)
    write_text(args.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
