"""Compares the robust accuracy and the time of `aa-fast` with those of AutoAttack, on the same images.

    python benchmarks/evaluation.py demo --data cifar10 --images 512

Three methods run on every batch, in a random order:

- `standard`: the standard version of pyautoattack, in fp32 and contiguous layout, with the time of each attack;
- `aa-fast`: our tier of this name, with its defaults;
- `apgd-ce`: our APGD on the cross-entropy alone, for comparison with the first attack of the ensemble.

Accuracies are point-wise worst cases over the attacks of a method, scored in fp32. Both wall time and processor time
are reported, since other work on the machine affects processor time less. Ratios are ratios of sums over batches, with
95 % bootstrap intervals over batches. Results are written after every batch and method, and the same command resumes
with the missing ones. `--only` runs one method, `--report` writes the table of stored results.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_prune.attacks import ThreatModel, frozen_eval
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console
from robust_prune.data.base import TensorImages
from robust_prune.evaluation.autoattack import ATTACKS, StandardEnsemble
from robust_prune.evaluation.evaluate import Subject, evaluate
from robust_prune.evaluation.scoring import check_points, score
from robust_prune.evaluation.stages import Stage
from robust_prune.evaluation.worst_case import Attacker
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.device import choose_device
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.models.layout import fastest_layout, has_fast_bf16
from robust_prune.recipe import EvaluationSection
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text
from robust_prune.serialization import to_json

METHODS = ("standard", "aa-fast", "apgd-ce")
RESAMPLES = 4000


class Stopwatch:
    """Wall time and processor time in seconds by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, label: str, begin: tuple[float, float]) -> None:
        self.seconds[label] = [time.perf_counter() - begin[0], time.process_time() - begin[1]]

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def standard(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, watch: Stopwatch) -> dict[str, list[bool]]:
    """Return which images are classified correctly after each attack of the ensemble."""
    with frozen_eval(model):
        ensemble = StandardEnsemble(model, threat, model(x[:1]).shape[1], 0, x.device)
        right = score(model, x, y)[0] == y
        survivors = {"clean": right.tolist()}
        for attack in ATTACKS:
            begin = watch.now()
            left = right.nonzero().flatten()
            if len(left):
                points = ensemble.points(attack, x[left], y[left])
                check_points(points, x[left], threat)
                right[left] = score(model, points, y[left])[0] == y[left]
            watch(attack, begin)
            survivors[attack] = right.tolist()
    return survivors


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the missing batches and methods, store each, and return all results."""
    recipe = load(args.recipe, {"data.name": args.data, "device": args.device})
    data = open_data(recipe)
    model = open_model_for(args.model, data, recipe, args.arch).module.eval()
    device, threat = torch.device(choose_device(recipe.device)), recipe.threat_model
    model.to(device)
    settings = {
        "model": models_hash(model),
        "data": data.name,
        "images": args.images,
        "batch": args.batch_size,
        "threat": to_json(threat),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    stored = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"settings": settings}
    if stored["settings"] != settings:
        raise SystemExit(f"{args.out} was made with other settings ({stored['settings']}). Move it away or use --out.")
    rows: list[dict[str, Any]] = stored.get("rows", [])
    have = {(row["batch"], row["method"]) for row in rows}
    shuffler = random.Random(0)
    for batch, start in enumerate(range(0, args.images, args.batch_size)):
        order = list(METHODS)
        shuffler.shuffle(order)
        images, y = data.test.get(torch.arange(start, min(start + args.batch_size, args.images)))
        for method in order:
            if (batch, method) in have or (args.only and method != args.only):
                continue
            row = run(method, model, images, y, threat, device)
            rows.append({"batch": batch, "method": method, **row})
            environment = stored.get("environment") or snapshot()
            stored = {"settings": settings, "environment": environment, "rows": rows}
            write_json(args.out, stored)
            seconds = sum(wall for wall, _ in row["seconds"].values())
            console.print(f"batch {batch}, {method}: {sum(row['robust'])} of {len(y)} robust, {seconds:.0f} s")
    return stored


def run(
    method: str, model: nn.Module, images: Tensor, y: Tensor, threat: ThreatModel, device: torch.device
) -> dict[str, Any]:
    """Run one method on one batch; return the surviving images, also after each attack, and the seconds."""
    watch = Stopwatch()
    if method == "standard":
        survivors = standard(model, images.to(device).float() / 255, y.to(device), threat, watch)
        return {"robust": survivors[ATTACKS[-1]], "survivors": survivors, "seconds": watch.seconds}
    fast = has_fast_bf16(device)
    if method == "apgd-ce":
        with frozen_eval(model):
            x, labels = images.to(device).float() / 255, y.to(device)
            right = score(model, x, labels)[0] == labels
            begin = watch.now()
            attacker = Attacker(model, threat, model(x[:1]).shape[1], 20, 1, 0, "bf16" if fast else "fp32")
            layout = fastest_layout(model, x[:2])
            left = right.nonzero().flatten()
            if len(left):
                ready = x[left].contiguous(memory_format=layout)
                right[left] = attacker.run(Stage("apgd-ce", "apgd-ce"), ready, labels[left], 0)[0]
            watch(method, begin)
        return {"robust": right.tolist(), "seconds": watch.seconds}
    with TemporaryDirectory() as folder:
        state = Path(folder) / "state.npz"
        begin = watch.now()
        card = evaluate(
            model.to(device), TensorImages(images, y), threat,
            EvaluationSection(tier=method, restarts=1, batch_size=len(y), precision="auto" if fast else "fp32"),
            subject=Subject(method), state_path=state,
        )  # fmt: skip
        watch(method, begin)
        with np.load(state) as stored:
            robust = stored["robust"].tolist()
    return {"robust": robust, "breakdown": card.breakdown, "flags": card.flags, "seconds": watch.seconds}


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of the results, over the batches that all methods have completed."""
    settings, environment = result["settings"], result["environment"]
    by_method = {m: {row["batch"]: row for row in result["rows"] if row["method"] == m} for m in METHODS}
    batches = sorted(set.intersection(*(set(rows) for rows in by_method.values())))
    rows = {m: [by_method[m][batch] for batch in batches] for m in METHODS}
    right = {m: np.concatenate([row["robust"] for row in rows[m]]) for m in METHODS}
    first = np.concatenate([row["survivors"][ATTACKS[0]] for row in rows["standard"]])
    seconds = {
        m: np.array([[sum(s[i] for s in row["seconds"].values()) for i in (0, 1)] for row in rows[m]]) for m in METHODS
    }
    alone = np.array([row["seconds"][ATTACKS[0]] for row in rows["standard"]])
    both = np.array([[sum(row["seconds"][a][i] for a in ATTACKS[:2]) for i in (0, 1)] for row in rows["standard"]])
    second = np.concatenate([row["survivors"][ATTACKS[1]] for row in rows["standard"]])
    total = len(first)
    text = [
        f"# Evaluation: aa-fast against AutoAttack, {total} images of {settings['data']}\n",
        f"`benchmarks/evaluation.py`, batches of {settings['batch']}, {settings['threads']} threads, torch "
        f"{environment['versions']['torch']} on {environment['cpu']} ({settings['device']}). The standard is "
        f"pyautoattack {environment['versions'].get('pyautoattack', '')}. Ratios are of processor seconds.\n",
        "| method | robust | images apart from the standard | seconds | processor seconds | times faster [95 %] |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    whole = seconds["standard"]
    ours: dict[str, dict[str, np.ndarray]] = {
        "aa-fast": {"than the standard": whole, "than its two APGD attacks": both},
        "APGD-CE, ours": {"than pyautoattack's": alone},
    }
    for name, kept, mine in (
        ("AutoAttack standard (pyautoattack)", right["standard"], whole),
        ("its APGD-CE and APGD-T alone", second, both),
        ("aa-fast", right["aa-fast"], seconds["aa-fast"]),
        ("APGD-CE of pyautoattack", first, alone),
        ("APGD-CE, ours", right["apgd-ce"], seconds["apgd-ce"]),
    ):
        apart = ""
        if name == "aa-fast":
            weaker, stronger = int((kept & ~right["standard"]).sum()), int((~kept & right["standard"]).sum())
            apart = f"{weaker} more stand, {stronger} fewer"
        if name == "APGD-CE, ours":
            weaker, stronger = int((kept & ~first).sum()), int((~kept & first).sum())
            apart = f"{weaker} more stand, {stronger} fewer than after pyautoattack's"
        ratio = ", ".join(f"{_ratio(slow[:, 1], mine[:, 1])} {what}" for what, slow in ours.get(name, {}).items())
        text.append(
            f"| {name} | {100 * kept.mean():.2f} % | {apart} | {mine[:, 0].sum():.0f} | {mine[:, 1].sum():.0f} | "
            f"{ratio} |"
        )
    parts = {a: sum(row["seconds"][a][1] for row in rows["standard"]) for a in ATTACKS}
    text.append(
        "\nThe standard's processor seconds by attack: " + ", ".join(f"{a} {s:.0f}" for a, s in parts.items()) + ". "
        "Standing after each: "
        + ", ".join(f"{a} {sum(sum(row['survivors'][a]) for row in rows['standard'])}" for a in ATTACKS)
        + "."
    )
    return "\n".join(text) + "\n"


def _ratio(slow: np.ndarray, fast: np.ndarray) -> str:
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(slow), (RESAMPLES, len(slow)))
    low, high = np.percentile(slow[picks].sum(1) / fast[picks].sum(1), (2.5, 97.5))
    return f"{slow.sum() / fast.sum():.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a robust model: an artifact, a file of weights with --arch, or demo")
    parser.add_argument("--arch", default=None)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "evaluation.json")
    parser.add_argument("--report", action="store_true", help="draw the table of what is stored, measure nothing")
    args = parser.parse_args()
    tune_allocator()
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.report else measure(args)
    if {row["method"] for row in result["rows"]} != set(METHODS):
        return
    write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
