"""Points by which the default attack reports more robust accuracy than `aa-fast`, on dense models and cuts.

    python benchmarks/attack_gap.py --images 1000

The demo is pruned by half, three quarters and 86 % of its MACs and fine-tuned for one pass over 15,000, 25,000 and
35,000 images of CIFAR-10; two more dense models are the bases in `results/`. Each model is attacked by PGD on the
margin and the cross-entropy (the default), by PGD on the cross-entropy twice (the default until November 2026, with
the same number of steps) and by `aa-fast`, on the same test images. Results are written after each model, and the same
command goes on with the missing ones; the models are kept in `--work`.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple
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

RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    """A model of the table: its recipe, where its weights come from, and what is cut from it.

    Attributes:
        recipe: name of the recipe, which gives data, radius and architecture.
        weights: a model file, or ``demo``.
        ratio: share of the MACs to remove, 0 for none.
        images: number of training images of the fine-tuning after the cut.
    """

    recipe: str
    weights: str
    ratio: float = 0.0
    images: int = 0


DEMO = "cifar10-resnet20x2"
CASES = {
    "demo": Case(DEMO, "demo"),
    "demo, 50 % removed": Case(DEMO, "demo", 0.5, 15_000),
    "demo, 75 % removed": Case(DEMO, "demo", 0.75, 25_000),
    "demo, 86 % removed": Case(DEMO, "demo", 0.86, 35_000),
    **{
        name: Case(recipe, str(RESULTS / recipe / "train" / "model.safetensors"))
        for name, recipe in {
            "ResNet-18x0.5": "cifar10-resnet18x0.5", "ResNet-20, Fashion-MNIST": "fashion_mnist-resnet20",
        }.items()
    },
}  # fmt: skip


def opened(case: Case) -> tuple[Recipe, DataBundle, Any]:
    """Return the recipe of a case, the data and the loaded base."""
    recipe = load(case.recipe, {"pruning.ratio": case.ratio or 0.5})
    data = open_data(recipe)
    return recipe, data, open_model_for(case.weights, data, recipe, None)


def model_of(case: Case, work: Path) -> nn.Module:
    """Return the base or its cut, fine-tuned, from `work` if it is there."""
    recipe, data, loaded = opened(case)
    if not case.ratio:
        return loaded.module
    file = work / f"cut{case.ratio:g}.pt"
    if not file.exists():
        base = cut_base(loaded, data, recipe)
        settings = recipe.finetune.model_copy(update={"epochs": 1})
        small, _ = base.trained(settings, recipe, case.images, random_subset(data.validation, 100, 0))
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


def measure(name: str, images: int, work: Path) -> dict[str, Any]:
    """Return the figures of one model under the three attacks."""
    case, file = CASES[name], re.sub(r"\W+", "-", name)
    recipe, data, _ = opened(case)
    model, chosen = model_of(case, work), stratified(data.test, images)
    quick, strong = EvaluationSection(), EvaluationSection(tier="aa-fast")
    with mock.patch.object(worst_case, "PGD_OBJECTIVES", (cross_entropy,)):
        former = survivors(model, chosen, recipe, quick, work / f"former-{file}.{images}.npz")
    default = survivors(model, chosen, recipe, quick, work / f"default-{file}.{images}.npz")
    return {
        "name": name, "threat": str(recipe.threat_model), "former": former, "default": default,
        "aa-fast": survivors(model, chosen, recipe, strong, work / f"aa-fast-{file}.{images}.npz"),
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
        f"# Gap of the default attack to aa-fast\n\n`benchmarks/attack_gap.py`, {count:,} test images, "
        f"{'; '.join(machines)}; in percent, gaps in points with the paired 95 % interval over images. "
        "Passes: backward passes of single images, in thousands.\n",
        "| model | radius | clean | cross-entropy twice | margin and cross-entropy (default) | aa-fast "
        "| gap, cross-entropy twice | gap, default | passes: twice, default, aa-fast |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(result["rows"], key=lambda row: list(CASES).index(row["name"])):
        shares = [100 * row[arm]["robust"] / count for arm in ("former", "default", "aa-fast")]
        passes = ", ".join(f"{row[arm]['passes'] / 1000:,.0f}" for arm in ("former", "default", "aa-fast"))
        lines.append(
            f"| {row['name']} | {row['threat']} | {100 * row['default']['clean'] / count:.1f} | "
            + " | ".join(f"{share:.1f}" for share in shares)
            + f" | {gap(row, 'former', count)} | {gap(row, 'default', count)} | {passes} |"
        )
    alarms = sorted(
        {
            f"{row['name']}: {flag}"
            for row in result["rows"]
            for arm in ("former", "default", "aa-fast")
            for flag in row[arm]["flags"]
        }
    )
    lines.append(f"\nAlarms: {'; '.join(alarms) or 'none'}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--work", type=Path, default=Path("runs/attack-gap"))
    parser.add_argument("--out", type=Path, default=RESULTS / "attack_gap.json")
    args = parser.parse_args()
    tune_allocator()
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if result and result["images"] != args.images:
        raise SystemExit(f"{args.out} has {result['images']} images, not {args.images}. Move it away or use --out.")
    result = {"rows": [], **result, "images": args.images}
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if name not in {row["name"] for row in result["rows"]}:
            result["rows"].append({**measure(name, args.images, args.work), "environment": snapshot()})
            write_json(args.out, result)
            write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
