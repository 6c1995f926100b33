"""Clean accuracy, and robust accuracy under `aa-fast`, of the demo and its cuts on all test images of CIFAR-10.

    robust-prune compress demo --data cifar10 --recipe cifar10-resnet20x2 --ratio 0.5 --out runs/half
    robust-prune compress demo --data cifar10 --recipe cifar10-resnet20x2 --ratio 0.75 --out runs/quarter
    python benchmarks/headline.py --store half=runs/half/model.safetensors quarter=runs/quarter/model.safetensors
    python benchmarks/headline.py --images 10000

The second command keeps the cuts in half precision with the results, and what is judged is the models so rounded.

The attack takes hours on one core, so test images are judged by the thousand, in the order in which `--images` of the
commands takes them; results are written after each thousand, and the same command goes on with the missing ones, if
need be on another day. Every model is judged on the same images. The dense demo has no further training, its cuts have
the six epochs of fine-tuning of their recipe.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from attack_gap import DEMO, bits, survivors
from make_sample import store_model
from recovered import paired

import robust_prune as rp
from robust_prune.commands.common import open_data
from robust_prune.data.base import Subset, labels_of, stratified_order
from robust_prune.evaluation.intervals import wilson_interval
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe import EvaluationSection
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
MODELS: dict[str, str | Path] = {
    "dense": "demo",
    "half": RESULTS / DEMO / "half.safetensors",
    "quarter": RESULTS / DEMO / "quarter.safetensors",
}
"""The demo, and its cuts by the share of the MACs that they keep."""
AT_ONCE = 1000


def right(parts: list[dict[str, Any]]) -> np.ndarray:
    """Return 1.0 for each image that survives the tier, else 0.0."""
    return np.concatenate([bits(part["after_all"], AT_ONCE) for part in parts])


def share(count: float, images: int) -> str:
    """Return a share in percent with its 95 % interval."""
    low, high = wilson_interval(int(count), images)
    return f"{100 * count / images:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table."""
    lines = [
        "# Dense demo and its cuts under aa-fast\n\n`benchmarks/headline.py`, test images of CIFAR-10, Linf 8/255; in "
        "percent with 95 % intervals over images, differences in points and paired image by image.\n",
        "| model (share of the MACs) | images | clean | robust | robust, difference to the dense model |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    dense = result["models"].get("dense", [])
    for name, parts in result["models"].items():
        images = AT_ONCE * len(parts)
        both = min(len(parts), len(dense))
        apart = paired(right(parts[:both]), right(dense[:both])) if both and name != "dense" else "–"
        clean, robust = (sum(part[key] for part in parts) for key in ("clean", "robust"))
        lines.append(f"| {name} | {images:,} | {share(clean, images)} | {share(robust, images)} | {apart} |")
    every = [part for parts in result["models"].values() for part in parts]
    machines = sorted({f"{part['environment']['cpu']}, commit {part['environment']['commit'][:7]}" for part in every})
    alarms = sorted({flag for part in every for flag in part["flags"]})
    hours = sum(part["processor_seconds"] for part in every) / 3600
    lines.append(
        f"\nMeasured on {'; '.join(machines)}: {hours:.1f} processor hours. Alarms: {'; '.join(alarms) or 'none'}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help=f"a multiple of {AT_ONCE:,}")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--work", type=Path, default=Path("runs/headline"))
    parser.add_argument("--out", type=Path, default=RESULTS / "headline.json")
    parser.add_argument("--store", nargs="+", metavar="NAME=FILE", help="models to keep with the results, then stop")
    args = parser.parse_args()
    if args.store:
        for text in args.store:
            name, _, file = text.partition("=")
            store_model(Path(file), Path(MODELS[name]))
        return
    tune_allocator()
    recipe = load(DEMO, {"data.name": "cifar10"})
    test = open_data(recipe).test
    order = stratified_order(labels_of(test))
    args.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"models": {}}
    for first in range(0, args.images, AT_ONCE):
        for name in args.only:
            # Another process may have written the rows of other models meanwhile.
            result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else result
            parts = result["models"].setdefault(name, [])
            if AT_ONCE * len(parts) > first:
                continue
            images = Subset(test, order[first : first + AT_ONCE])
            state = args.work / f"{name}.{first}.npz"
            model = rp.load(MODELS[name]).module
            found = survivors(model, images, recipe, EvaluationSection(tier="aa-fast"), state)
            result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else result
            result["models"].setdefault(name, []).append({**found, "environment": snapshot()})
            write_json(args.out, result)
            write_text(args.out.with_suffix(".md"), table(result))
            print(table(result), flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
