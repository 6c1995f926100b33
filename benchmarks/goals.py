"""Whether a goal that was met on held-out images is kept on test images.

    python benchmarks/goals.py --trials 10

`compress --min-robust` promises that the model found keeps the wanted robust accuracy on test images with 90 %
confidence. Each trial draws other images and another seed: of the 10,000 test images of Fashion-MNIST, which the base
(ResNet-20, radius 0.1) was not trained on, 1,000 are held out to search, and another 1,000 judge what was found; 4,000
training images recover it. Odd trials ask for a least robust accuracy, even ones for a largest drop. The settings are
small (one epoch, PGD-10 from one start). The goals, the settings and the number of trials were fixed before the first
run. Trials are stored one by one, and the same command goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import robust_prune as rp
from robust_prune.console import console
from robust_prune.data.base import DataBundle, Subset, stratified
from robust_prune.errors import QualityGateError
from robust_prune.goal import CONFIDENCE
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.runs.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
BASE = RESULTS / "fashion_mnist-resnet20" / "train" / "model.safetensors"
LEAST, DROP = 67.0, 4.0
TRAIN, HELD_OUT, TEST = 4000, 1000, 1000
SETTINGS: dict[str, Any] = {
    "finetune__epochs": 1, "finetune__validation_images": 100, "sensitivity__images": 256,
    "pruning__repair_images": 256, "evaluation__steps": 10, "evaluation__restarts": 1,
    "bench__seconds": 1.0, "bench__batches": (1,), "bench__kinds": ("host",),
}  # fmt: skip


def drawn(data: DataBundle, seed: int) -> DataBundle:
    """Return the bundle of a trial: training images, and disjoint held-out and test images of the test split."""
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))
    parts = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + TEST]
    held_out, test = (Subset(data.test, part) for part in parts)
    train = stratified(data.train, TRAIN, seed)
    return replace(data, name=f"{data.name}, draw {seed}", train=train, validation=held_out, test=test)


def trial(data: DataBundle, seed: int) -> dict[str, Any]:
    """Return the goal of a trial, what it tried, and whether test images keep it; `found` is None without a model."""
    goal: dict[str, Any] = {"min_robust": LEAST} if seed % 2 else {"max_drop": DROP}
    with TemporaryDirectory() as folder:
        try:
            done = rp.compress(
                str(BASE), drawn(data, seed), recipe="fashion_mnist-resnet20", out=Path(folder) / "run", seed=seed,
                **goal, **SETTINGS,
            )  # fmt: skip
        except QualityGateError as error:
            return {"seed": seed, "goal": goal, "found": None, "note": str(error)}
    cards = [model.card for model in done.report.models if model.card is not None]
    dense, robust = (100 * card.robust.value for card in cards[:2])
    kept = robust >= LEAST if seed % 2 else dense - robust <= DROP
    note = next(note for note in done.report.notes if note.startswith("Goal: "))
    macs = done.report.models[1].macs / done.report.models[0].macs
    return {
        "seed": seed, "goal": goal, "found": 1 - macs, "dense": dense, "robust": robust, "kept": kept, "note": note
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "goals.json")
    args = parser.parse_args()
    tune_allocator()
    data = rp.load_data("fashion_mnist")
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for seed in range(1, args.trials + 1):
        if any(row["seed"] == seed for row in rows):
            continue
        rows.append(trial(data, seed) | {"environment": snapshot()})
        write_json(args.out, {"rows": rows})
        write_text(args.out.with_suffix(".md"), report(rows))
        console.print(report(rows), markup=False)


def report(rows: list[dict[str, Any]]) -> str:
    """Return the table of all trials as Markdown."""
    found = [row for row in rows if row["found"] is not None]
    machines = {(row["environment"]["cpu"], str(row["environment"]["commit"])[:7]) for row in rows}
    lines = [
        "# Goals, kept on test images\n\n`benchmarks/goals.py`: ResNet-20 on Fashion-MNIST, Linf 0.1, PGD-10, "
        f"{HELD_OUT:,} held-out and {TEST:,} test images in each trial, other ones each time. The goal was kept in "
        f"{sum(row['kept'] for row in found)} of {len(found)} models found in {len(rows)} trials; "
        f"{100 * CONFIDENCE:g} % were promised. "
        + "; ".join(f"{cpu}, commit {commit}" for cpu, commit in sorted(machines))
        + ".\n",
        "| trial | goal | MACs removed | dense, % | found, % | kept | tried |",
        "| ---: | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        ((kind, value),) = row["goal"].items()
        goal = f"at least {value:g} %" if kind == "min_robust" else f"at most {value:g} points less"
        tried = ", ".join(re.findall(r"([\d.]+ %): [\d.]+ % \(bound", row["note"]))
        if row["found"] is None:
            lines.append(f"| {row['seed']} | {goal} | none | | | | {tried} |")
            continue
        lines.append(
            f"| {row['seed']} | {goal} | {100 * row['found']:.0f} % | {row['dense']:.1f} | {row['robust']:.1f} | "
            f"{'yes' if row['kept'] else 'no'} | {tried} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
