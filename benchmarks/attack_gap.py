"""Points by which the default attack reports more robust accuracy than `aa-fast`, on a dense model and its cuts.

    python benchmarks/attack_gap.py --images 1000

The demo is pruned by half, three quarters and 86 % of its MACs and fine-tuned for one pass over 15,000, 25,000 and
35,000 images of CIFAR-10. Each model is attacked by PGD on the margin and the cross-entropy (the default), by PGD on
the cross-entropy twice (the default until November 2026, with the same number of steps) and by `aa-fast`, on the same
test images. Results are written after each model, and the same command goes on with the missing ones; the models are
kept in `--work`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from recovered import cut_base
from torch import nn

from robust_prune.attacks.objectives import cross_entropy
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.data.base import DataBundle, ImageSet, random_subset, stratified
from robust_prune.evaluation import worst_case
from robust_prune.evaluation.evaluate import Subject, evaluate
from robust_prune.evaluation.state import load_state
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe import EvaluationSection, Recipe
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text

CUTS = {0.0: 0, 0.5: 15_000, 0.75: 25_000, 0.86: 35_000}
"""Share of the MACs removed, and the number of images of the fine-tuning."""
RECIPE = "cifar10-resnet20x2"


def opened(ratio: float) -> tuple[Recipe, DataBundle, Any]:
    """Return the recipe of one cut, the data and the loaded demo."""
    recipe = load(RECIPE, {"data.name": "cifar10", "pruning.ratio": ratio or 0.5})
    data = open_data(recipe)
    return recipe, data, open_model_for("demo", data, recipe, None)


def model_of(ratio: float, work: Path) -> nn.Module:
    """Return the demo (ratio 0) or its cut, fine-tuned, from `work` if it is there."""
    recipe, data, loaded = opened(ratio)
    if not ratio:
        return loaded.module
    file = work / f"cut{ratio:g}.pt"
    if not file.exists():
        base = cut_base(loaded, data, recipe)
        settings = recipe.finetune.model_copy(update={"epochs": 1})
        small, _ = base.trained(settings, recipe, CUTS[ratio], random_subset(data.validation, 100, 0))
        work.mkdir(parents=True, exist_ok=True)
        torch.save(small, file)
    return torch.load(file, weights_only=False)


def survivors(
    model: nn.Module, images: ImageSet, recipe: Recipe, section: EvaluationSection, state: Path
) -> dict[str, Any]:
    """Return the card's figures, and which images survived PGD and the whole tier, as packed bits."""
    begin = time.process_time()
    card = evaluate(model, images, recipe.threat_model, section, subject=Subject("model"), state_path=state)
    key = json.loads(np.load(state)["head"].tobytes().decode())["key"]
    found, _ = load_state(state, key, len(images))
    after_pgd = found.clean & (found.fell != 0)
    return {
        "clean": card.clean.correct, "robust": card.robust.correct, "flags": list(card.flags), "attack": card.attack,
        "passes": card.backwards, "processor_seconds": time.process_time() - begin,
        "after_pgd": np.packbits(after_pgd).tobytes().hex(), "after_all": np.packbits(found.robust).tobytes().hex(),
    }  # fmt: skip


def measure(ratio: float, images: int, work: Path) -> dict[str, Any]:
    """Return the figures of one model under the three attacks."""
    recipe, data, _ = opened(ratio)
    model, chosen = model_of(ratio, work), stratified(data.test, images)
    quick, strong = EvaluationSection(), EvaluationSection(tier="aa-fast")
    with mock.patch.object(worst_case, "PGD_OBJECTIVES", (cross_entropy,)):
        former = survivors(model, chosen, recipe, quick, work / f"former{ratio:g}.{images}.npz")
    default = survivors(model, chosen, recipe, quick, work / f"default{ratio:g}.{images}.npz")
    return {
        "ratio": ratio, "former": former, "default": default,
        "aa-fast": survivors(model, chosen, recipe, strong, work / f"aa-fast{ratio:g}.{images}.npz"),
    }  # fmt: skip


def bits(text: str, count: int) -> np.ndarray:
    """Return 1.0 for each surviving image, else 0.0."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(float)


def gap(row: dict[str, Any], arm: str, count: int) -> str:
    """Return the points that an arm reports beyond `aa-fast`, with the paired 95 % interval over images."""
    each = 100 * (bits(row[arm]["after_all"], count) - bits(row["aa-fast"]["after_all"], count))
    half = 1.96 * each.std(ddof=1) / len(each) ** 0.5
    return f"{each.mean():.1f} [{each.mean() - half:.1f}, {each.mean() + half:.1f}]"


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table."""
    count = result["images"]
    machines = sorted(
        {f"{row['environment']['cpu']}, commit {row['environment']['commit'][:7]}" for row in result["rows"]}
    )
    lines = [
        f"# Gap of the default attack to aa-fast\n\n`benchmarks/attack_gap.py`, {count:,} test images of CIFAR-10, "
        f"Linf 8/255, {'; '.join(machines)}; in percent, gaps in points with the paired 95 % interval over images. "
        "Passes: backward passes of single images, in thousands.\n",
        "| MACs removed | clean | cross-entropy twice | margin and cross-entropy (default) | aa-fast "
        "| gap, cross-entropy twice | gap, default | passes: twice, default, aa-fast |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(result["rows"], key=lambda row: row["ratio"]):
        shares = [100 * row[arm]["robust"] / count for arm in ("former", "default", "aa-fast")]
        passes = ", ".join(f"{row[arm]['passes'] / 1000:,.0f}" for arm in ("former", "default", "aa-fast"))
        lines.append(
            f"| {100 * row['ratio']:g} % | {100 * row['default']['clean'] / count:.1f} | "
            + " | ".join(f"{share:.1f}" for share in shares)
            + f" | {gap(row, 'former', count)} | {gap(row, 'default', count)} | {passes} |"
        )
    alarms = {flag for row in result["rows"] for arm in ("former", "default", "aa-fast") for flag in row[arm]["flags"]}
    lines.append(f"\nAlarms: {'; '.join(sorted(alarms)) or 'none'}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--work", type=Path, default=Path("runs/attack-gap"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attack_gap.json")
    args = parser.parse_args()
    tune_allocator()
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if result and result["images"] != args.images:
        raise SystemExit(f"{args.out} has {result['images']} images, not {args.images}. Move it away or use --out.")
    result = {"rows": [], **result, "images": args.images}
    args.work.mkdir(parents=True, exist_ok=True)
    for ratio in args.ratios:
        if ratio not in {row["ratio"] for row in result["rows"]}:
            result["rows"].append({**measure(ratio, args.images, args.work), "environment": snapshot()})
            write_json(args.out, result)
            write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
