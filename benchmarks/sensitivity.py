"""Time and accuracy of the MRS estimators, compared with the published procedure.

    python benchmarks/sensitivity.py demo --data sample

The reference is a plain reimplementation of Module Robust Criticality as described by RiFT (arXiv 2308.02533): for
every convolution and linear weight, ten epochs of SGD ascent with learning rate 1 over the fixed adversarial set in
batches of 512, projected to the ball of relative radius ρ after each epoch; the result is the largest loss found. Only
this weight requires gradients, and nothing is cached between steps or modules. A second reference is the same procedure
with the passes of our estimators: in bf16 where the hardware supports it, in the fastest memory layout, and with the
outputs of the layers before a weight recorded. The ratio to it is what the estimators save by searching less. Every
epoch takes the same time: with `--reference-epochs` below ten, the time is measured over so many epochs and
extrapolated, and the MRS of the references is not reported.

All methods use the same adversarial set and run in a random order in each round; the references run only in the first
round. Times are medians over rounds; ratios are quotients of medians, with the smallest and largest over rounds. On a
CPU they are based on processor time, which other work on the machine affects less. Agreement is Spearman's rank
correlation over modules. Results are written after every method, and the same command resumes with the missing ones.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from robust_prune.attacks import frozen_eval
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console, track
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.device import choose_device
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.models.layout import fastest_layout
from robust_prune.recipe import SensitivitySection
from robust_prune.recipe_reader import load, make_section
from robust_prune.runs.files import write_json, write_text
from robust_prune.sensitivity.adversarial_set import AdversarialSet, make_adversarial_set
from robust_prune.sensitivity.estimators import ESTIMATORS, measure
from robust_prune.sensitivity.losses import RobustLoss
from robust_prune.sensitivity.recordings import Recordings
from robust_prune.sensitivity.replay import trace_calls
from robust_prune.sensitivity.targets import find_targets
from robust_prune.serialization import to_json

REFERENCE, CACHED = "reference", "reference, our passes"
EPOCHS = 10
BATCH = 512
MEMORY = 4 << 30


def reference(model: nn.Module, adv: AdversarialSet, rho: float, epochs: int, device: str) -> dict[str, float]:
    """Return MRS by module name, by the published procedure."""
    found = {}
    x, y = adv.images.to(device), adv.labels.to(device)
    with frozen_eval(model):
        targets = find_targets(model)
        with torch.no_grad():
            base = _mean_loss(model, x, y)
        with track("Reference procedure", len(targets)) as advance:
            for target in targets:
                found[target.name] = _ascend(model, target.weight, x, y, rho, epochs) - base
                advance()
    return found


def cached_reference(model: nn.Module, adv: AdversarialSet, rho: float, epochs: int, device: str) -> dict[str, float]:
    """Return MRS by module name, by the published procedure with the passes of our estimators."""
    found = {}
    with frozen_eval(model):
        targets = find_targets(model)
        weights = [target.weight for target in targets]
        loss = RobustLoss(model, adv, BATCH, torch.device(device))
        few = next(loss.batches())[0][:2]
        loss = replace(loss, layout=fastest_layout(model, few)).fast()
        trace = trace_calls(model, few, weights)
        with track("Reference procedure, our passes", len(targets)) as advance:
            for target in targets:
                recordings = Recordings(loss, trace, [target.weight], MEMORY)
                with torch.no_grad():
                    base = _replayed_loss(recordings, target.weight)
                found[target.name] = _ascend_replayed(recordings, target.weight, rho, epochs) - base
                advance()
    return found


def _replayed_loss(recordings: Recordings, weight: nn.Parameter) -> float:
    total = 0.0
    for x, y, recording in recordings.batches():
        with recordings.loss.autocast():
            logits = recordings.replay(weight, x, recording)
        total += F.cross_entropy(logits.float(), y, reduction="sum").item()
    return total / len(recordings.loss.adv)


def _ascend_replayed(recordings: Recordings, weight: nn.Parameter, rho: float, epochs: int) -> float:
    start = weight.detach().clone()
    weight.requires_grad_(True)
    best = -float("inf")
    try:
        for _ in range(epochs):
            for x, y, recording in recordings.batches():
                with recordings.loss.autocast():
                    logits = recordings.replay(weight, x, recording)
                (slope,) = torch.autograd.grad(F.cross_entropy(logits.float(), y), weight)
                with torch.no_grad():
                    weight.add_(slope)
            with torch.no_grad():
                change = weight - start
                weight.copy_(start + change * min(1.0, rho * float(start.norm()) / max(float(change.norm()), 1e-12)))
                best = max(best, _replayed_loss(recordings, weight))
    finally:
        weight.requires_grad_(False)
        with torch.no_grad():
            weight.copy_(start)
    return best


def _mean_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
    return sum(F.cross_entropy(model(a), b, reduction="sum").item() for a, b in parts) / len(y)


def _ascend(model: nn.Module, weight: nn.Parameter, x: torch.Tensor, y: torch.Tensor, rho: float, epochs: int) -> float:
    start = weight.detach().clone()
    weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=1.0, maximize=True)
    best = -float("inf")
    try:
        for _ in range(epochs):
            for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(a), b).backward()
                optimizer.step()
            with torch.no_grad():
                change = weight - start
                weight.copy_(start + change * min(1.0, rho * float(start.norm()) / max(float(change.norm()), 1e-12)))
                best = max(best, _mean_loss(model, x, y))
    finally:
        weight.requires_grad_(False)
        weight.grad = None
        with torch.no_grad():
            weight.copy_(start)
    return best


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return times and MRS of every method; results in `args.out` are not measured again."""
    recipe = load(args.recipe, {"data.name": args.data, "device": args.device, "sensitivity.images": args.images})
    data = open_data(recipe)
    loaded = open_model_for(args.model, data, recipe, args.arch)
    device, threat = choose_device(recipe.device), recipe.threat_model
    model = loaded.module.to(device)
    adv = make_adversarial_set(model, data.train, threat, recipe.sensitivity, seed=recipe.seed, device=device)
    rho = recipe.sensitivity.rho

    def estimate(name: str) -> dict[str, float]:
        section = make_section(SensitivitySection, estimator=name, rho=rho)
        profile = measure(model, adv, section, radii=(rho,), device=device)
        return {module.name: module.mrs for module in profile.modules}

    methods: dict[str, Callable[[], dict[str, float]]] = {
        REFERENCE: lambda: reference(model, adv, rho, args.reference_epochs, device),
        CACHED: lambda: cached_reference(model, adv, rho, args.reference_epochs, device),
        **{name: (lambda name=name: estimate(name)) for name in ESTIMATORS},
    }
    settings = {
        "model": models_hash(model),
        "arch": loaded.spec.arch,
        "data": data.name,
        "images": len(adv),
        "modules": len(find_targets(model)),
        "rho": rho,
        "threat": to_json(threat),
        "attack_steps": recipe.sensitivity.steps,
        "seed": recipe.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "reference_epochs": args.reference_epochs,
    }
    result = _stored(args.out, settings) or {
        **settings,
        "seconds": {name: [] for name in methods},
        "processor_seconds": {name: [] for name in methods},
        "mrs": {},
        "environment": snapshot(),
    }
    order = list(methods)
    shuffler = random.Random(0)
    for number in range(args.rounds):
        shuffler.shuffle(order)
        for name in order:
            if len(result["seconds"][name]) > (0 if name in (REFERENCE, CACHED) else number):
                continue
            begin, used = time.perf_counter(), time.process_time()
            result["mrs"][name] = methods[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            scale = EPOCHS / args.reference_epochs if name in (REFERENCE, CACHED) else 1.0
            result["seconds"][name].append(scale * (time.perf_counter() - begin))
            result["processor_seconds"][name].append(scale * (time.process_time() - used))
            console.print(f"{name}: {result['seconds'][name][-1]:.2f} s", markup=False)
            write_json(args.out, result)
    return result


def _stored(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(found.get(key) != value for key, value in settings.items()):
        raise SystemExit(f"{path} holds results of other settings. Choose another --out, or remove it.")
    return found


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of one result."""
    names = list(result["mrs"]["ascent"])
    mrs = {method: np.array([found[name] for name in names]) for method, found in result["mrs"].items()}
    environment = result["environment"]
    # On a CPU, processor time excludes waiting for other work on the machine.
    clock = "processor_seconds" if result["device"] == "cpu" else "seconds"
    slow, cached = (np.array(result[clock].get(name, [])) for name in (REFERENCE, CACHED))
    rounds = len(result[clock]["ascent"])
    whole = result["reference_epochs"] == EPOCHS
    scaled = (
        "" if whole else f" The reference ran for {result['reference_epochs']} of its {EPOCHS} epochs, times scaled."
    )
    lines = [
        f"# MRS estimators: {result['arch']}, {result['images']} images of {result['data']}\n",
        f"`benchmarks/sensitivity.py`: {result['modules']} modules, ρ = {result['rho']}, rounds: {rounds} (reference: "
        f"{len(slow)}), torch "
        f"{environment['versions']['torch']} on {environment['cpu']} ({result['device']}, {result['threads']} "
        f"threads). Ratios of {clock.replace('_', ' ')}: median and range over the rounds.{scaled}\n",
        "| method | seconds (median) | times faster than the reference | than the reference with our passes | "
        "processor seconds | Spearman with ascent | mean MRS |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in (REFERENCE, *([CACHED] if len(cached) else []), *reversed(ESTIMATORS)):
        mine = np.array(result[clock][method])
        faster = [_times(other, mine) for other in (slow, cached)]
        agreement, mean = f"{spearmanr(mrs[method], mrs['ascent']).statistic:.3f}", f"{mrs[method].mean():.3f}"
        if method in (REFERENCE, CACHED):
            faster = ["" if method == REFERENCE else faster[0], ""]
            agreement, mean = (agreement, mean) if whole else ("", "")
        lines.append(
            f"| {method} | {np.median(result['seconds'][method]):.2f} | {' | '.join(faster)} | "
            f"{np.median(result['processor_seconds'][method]):.2f} | {agreement} | {mean} |"
        )
    return "\n".join(lines) + "\n"


def _times(slow: np.ndarray, fast: np.ndarray) -> str:
    """Return how many times as fast, by medians, with the range over the rounds; empty if nothing was measured."""
    if not len(slow):
        return ""
    ratio = slow / fast
    return f"{np.median(slow) / np.median(fast):.1f} [{ratio.min():.1f}, {ratio.max():.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a robust model: an artifact, a file of weights with --arch, or demo")
    parser.add_argument("--arch", default=None)
    parser.add_argument("--data", default="sample")
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference-epochs", type=int, default=EPOCHS, choices=range(1, EPOCHS + 1), metavar="1..10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sensitivity.json")
    args = parser.parse_args()
    tune_allocator()
    result = run(args)
    write_json(args.out, result)
    write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
