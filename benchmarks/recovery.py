"""What each fine-tuning method recovers in the same time, and what the presets of `compress --recovery` do.

    python benchmarks/recovery.py methods demo --data cifar10 --minutes 4
    python benchmarks/recovery.py presets demo --data cifar10 --train-images 10000

The model is cut to a quarter of its MACs once, and every way begins with that. `methods` gives each the same training
time: some steps are timed first, and it then trains on as many images as fit, in equal epochs as few as the data allow,
with its schedule ending there. Scoring the epochs on held-out images is not counted. `presets` trains as the presets
say. Accuracy is PGD-20's on held-out training images and on test images, and differences to the first row's are paired
image by image. Results are written after every way and seed; the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
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
from robust_prune.data.base import DataBundle, ImageSet, first, random_subset
from robust_prune.environment import snapshot
from robust_prune.evaluation.evaluate import evaluate
from robust_prune.evaluation.hashing import models_hash
from robust_prune.machine import tune_allocator
from robust_prune.models.layout import has_fast_bf16
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
    found = {}
    for split, images in (("held-out", data.validation), ("test", first(data.test, recipe.evaluation.images))):
        with TemporaryDirectory() as folder:
            state = Path(folder) / "state.npz"
            evaluate(
                small, images, stages.threat_of(recipe), model_name="recovered", data_name=data.name, split=split,
                restarts=1, device=device, precision="bf16" if has_fast_bf16(torch.device(device)) else "fp32",
                state_path=state,
            )  # fmt: skip
            with np.load(state) as stored:
                bits = {name: np.packbits(stored[name]).tobytes().hex() for name in ("clean", "robust")}
        found[split] = {"images": len(images), **bits}
    return found


def run(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """All ways and seeds, stored ones first."""
    recipe = load(
        args.recipe,
        {"data.name": args.data, "device": args.device, "pruning.ratio": 0.75, "evaluation.images": args.test_images},
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
        settings["minutes"] = args.minutes
    part: dict[str, Any] = result.setdefault(args.part, {**settings, "rows": []})
    if {key: part[key] for key in settings} != settings:
        raise SystemExit(f"{args.out} has {args.part} of other settings than {settings}. Move it away or use --out.")
    have = {(row["name"], row["seed"]) for row in part["rows"]}
    ways = WAYS[args.part]
    todo = [(seed, name) for seed in args.seeds for name in args.only or ways if (name, seed) not in have]
    if not todo:
        return result
    analysis = stages.analyse(dense, loaded.spec, data.train, recipe, device)
    surgery = apply(dense.cpu(), stages.plan_cut(analysis, recipe.pruning), stages.blank_image(loaded.spec))
    stages.compensate(surgery, dense, data.train, recipe, device)
    base = Base(surgery.model, dense, data, device)
    for seed, name in todo:
        seeded = recipe.model_copy(update={"seed": seed})
        tuning = recipe.finetune.model_copy(update=ways[name])
        epochs, count = tuning.epochs, len(data.train)
        if args.part == "methods":
            epochs, count = base.affordable(tuning, seeded, args.minutes)
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


def _difference(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    if rows is reference:
        return ""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in reference}
    mine, theirs = (
        np.mean([right_images(row["test"], "robust") for row in found if row["seed"] in seeds], 0)
        for found in (rows, reference)
    )
    return paired(mine, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(WAYS))
    parser.add_argument("model", help="the robust base: an artifact, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default="cifar10-resnet20x2", help="threat model, fine-tuning and evaluation")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the part's ways")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train-images", type=int, help="all by default")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recovery.json")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - set(WAYS[args.part]):
        parser.error(f"--only takes {', '.join(WAYS[args.part])}; got {', '.join(sorted(unknown))}")
    tune_allocator()
    result = run(args, json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {})
    parts = [table(result, part) for part in WAYS if part in result]
    text = "# Recovery after the cut\n\n`benchmarks/recovery.py`\n\n" + "\n".join(parts)
    write_text(args.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
