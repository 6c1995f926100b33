"""Alarms of the evaluation on models that cheat (`cheating_models.py`) and honest ones that look odd (`odd_models.py`).

    python benchmarks/alarms.py --images 200
    python benchmarks/alarms.py --images 32 --tier aa-fast --claims --out alarms_aa_fast.json

Each model wraps the demo, or is a small network trained for a few passes. It is evaluated in the default tier, or
another one, on test images of CIFAR-10. Beside the accuracy that a cheat claims stands what an adaptive attack leaves:
the default attack on the model without its disguise, every iterate of which is shown to the cheat. The checks before
and after the attack are the same in every tier; what the attack itself saw differs. Results are written after each
model, and the same command goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import cheating_models
import odd_models
import torch
from torch import Tensor, nn

import robust_prune as rp
from robust_prune.attacks import ThreatModel
from robust_prune.attacks.objectives import classify
from robust_prune.commands.common import open_data
from robust_prune.data.base import DataBundle, ImageSet, TensorImages, random_subset, stratified
from robust_prune.errors import UsageError
from robust_prune.evaluation import evaluate as evaluation
from robust_prune.evaluation.evaluate import evaluate
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe import EvaluationSection, TrainSettings
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text
from robust_prune.training.trainer import train

THREAT = ThreatModel("linf", 8 / 255)
VEHICLES = (0, 1, 8, 9)


class Shown:
    """A model that is asked at every point that an attack on another model visits; an `ExportedModel`.

    A copy is asked each time, so that nothing is remembered.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.key = model, ""

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W]."""
        return copy.deepcopy(self.model)(images).float()

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted classes [N]."""
        return classify(self.logits(images))


def trained(name: str, data: DataBundle, work: Path) -> nn.Module:
    """Return a small network, trained on 20,000 images for 4 epochs, from `work` if it is there."""
    file = work / f"{name.replace(' ', '-')}.pt"
    make, loss = odd_models.TRAINED[name]
    torch.manual_seed(0)
    model = make()
    if not file.exists():
        settings = TrainSettings(loss=loss, epochs=4, crop_padding=0, ema_decay=0.99)
        few, held_out = random_subset(data.train, 20_000, 0), random_subset(data.validation, 200, 0)
        train(model, few, held_out, THREAT, settings)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def models(base: nn.Module, data: DataBundle, work: Path) -> dict[tuple[str, str], tuple[nn.Module, nn.Module]]:
    """Return each model and its undisguised one, by kind and name."""
    found: dict[tuple[str, str], tuple[nn.Module, nn.Module]] = {}
    for name in odd_models.TRAINED:
        own = trained(name, data, work)
        found["honest", name] = own, own
    for kind, wrappers in (("honest", odd_models.HONEST), ("cheat", cheating_models.CHEATS)):
        for name, wrapper in wrappers.items():
            model = wrapper(base).eval()
            found[kind, name] = model, (base if kind == "cheat" else model)
    return found


def images_for(name: str, images: ImageSet) -> ImageSet:
    """Return the images with the labels that the model answers with."""
    if name != "two classes":
        return images
    x, y = images.get(torch.arange(len(images)))
    return TensorImages(x, torch.isin(y, torch.tensor(VEHICLES)).long())


class Passes:
    """Counts the images that a model and its copies are asked for; those that need a gradient count three times."""

    def __init__(self, model: nn.Module) -> None:
        self.images = 0
        # A hook leaves precision and class of the model as they are, and a copy of the model keeps it.
        self.hook = model.register_forward_pre_hook(self.count)

    def count(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the images of one call."""
        needs_gradient = inputs[0].requires_grad and torch.is_grad_enabled()
        self.images += len(inputs[0]) * (3 if needs_gradient else 1)

    def __deepcopy__(self, memory: object) -> Passes:
        return self


def measure(
    model: nn.Module, plain: nn.Module, images: ImageSet, tier: str, steps: int, adaptive: bool
) -> dict[str, Any]:
    """Return the figures of one model, without those of the adaptive attack unless it is `adaptive`."""
    section = EvaluationSection(tier=tier, steps=steps)
    checks, passes = [0], Passes(model)

    def looked(original: Any) -> Any:
        def call(*args: Any) -> Any:
            before = passes.images
            found = original(*args)
            checks[0] += passes.images - before
            return found

        return call

    looks = {name: looked(getattr(evaluation, name)) for name in ("_first_look", "_last_look")}
    with mock.patch.multiple(evaluation, **looks):
        card = evaluate(model, images, THREAT, section)
    total = passes.images
    passes.hook.remove()
    truth = card
    left: int | None
    if not adaptive:
        left = None
    elif plain is not model:
        truth_card = evaluate(plain, images, THREAT, section, exported={"cheat": Shown(type(model)(plain).eval())})
        left = min(truth_card.exported["cheat"].robust.correct, card.robust.correct)
    else:
        left = truth.robust.correct
    return {
        "clean": card.clean.correct, "claimed": card.robust.correct, "truth": left, "flags": list(card.flags),
        "checks": checks[0], "passes": total - checks[0],
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table."""
    count = result["images"]
    machines = sorted(
        {f"{row['environment']['cpu']}, commit {row['environment']['commit'][:7]}" for row in result["rows"]}
    )
    lines = [
        f"# Alarms\n\n`benchmarks/alarms.py`, {count:,} test images of CIFAR-10, tier {result['tier']}, Linf 8/255, "
        f"{'; '.join(machines)}; the wrapped model is {result['model']}; accuracies in percent.\n",
        "| | model | clean | claimed robust | after an adaptive attack | alarms |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in result["rows"]:
        figures = [row[key] for key in ("clean", "claimed", "truth")]
        shares = " | ".join("–" if figure is None else f"{100 * figure / count:.1f}" for figure in figures)
        lines.append(f"| {row['kind']} | {row['name']} | {shares} | {' '.join(row['flags']) or '–'} |")
    for kind, what in (("cheat", "cheats"), ("honest", "honest models")):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        rung = f"{sum(bool(row['flags']) for row in rows)} of {len(rows)} {what} ring an alarm."
        lines.append(f"\n{rung if rows else f'No {what} measured.'}")
    plain = next((row for row in result["rows"] if row["name"] == "as it is"), None)
    if plain:
        share = plain["checks"] / (plain["passes"] / count * 1000)
        lines.append(
            f"\nThe checks cost {plain['checks']:,} forward passes of single images, a backward pass counted as two: "
            f"{100 * share:.1f} % of the attack on 1,000 images."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--tier", default="pgd")
    parser.add_argument("--steps", type=int, default=20, help="steps of PGD")
    parser.add_argument("--model", default="demo", help="the model that is wrapped")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the models")
    parser.add_argument("--claims", action="store_true", help="without the adaptive attack, which is that of tier pgd")
    parser.add_argument("--work", type=Path, default=Path("runs/alarms"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "alarms.json")
    args = parser.parse_args()
    tune_allocator()
    data = open_data(load("cifar10-resnet20x2", {"data.name": "cifar10"}))
    base = rp.load(args.model).module
    images = stratified(data.test, args.images)
    settings = {"images": args.images, "tier": args.tier, "model": args.model}
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"rows": []}
    if result["rows"] and {key: result[key] for key in settings} != settings:
        raise SystemExit(f"{args.out} was made with other settings than {settings}. Move it away or use --out.")
    result |= settings
    for (kind, name), (model, plain) in models(base, data, args.work).items():
        if name in {row["name"] for row in result["rows"]} or (args.only and name not in args.only):
            continue
        try:
            figures = measure(model, plain, images_for(name, images), args.tier, args.steps, not args.claims)
        except UsageError as error:  # the ensemble of tier standard needs four classes
            print(kind, name, f"left out: {error}", flush=True)
            continue
        result["rows"].append({"kind": kind, "name": name, **figures, "environment": snapshot()})
        write_json(args.out, result)
        write_text(args.out.with_suffix(".md"), table(result))
        print(kind, name, figures, flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
