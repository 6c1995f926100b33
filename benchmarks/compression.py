"""Robust accuracy, size and latency of cuts against the best rivals, on several networks and data sets.

    python benchmarks/compression.py rows resnet20_x2 --minutes 0 2 10
    python benchmarks/compression.py latency resnet20_x2
    python benchmarks/compression.py table

Question: does an allocation by Module Robustness Sensitivity (`mrs`), or by the loss of real cuts with branches that
may go whole (`cuts, branches`), keep more robust accuracy than rules without either, and than a small network from
scratch?

Every arm but the last removes the same share of the MACs of the same robust base (within 0.5 % where widths allow it,
see `criteria.py`), with the same repair and the same number of fine-tuning images: those that `--minutes` of training
take on one core, 0 for none. Steps are timed once for each base and ratio; minutes are processor minutes of one thread.
`from scratch` trains the network that the uniform cut leaves, from fresh weights, for the minutes of fine-tuning and
those that `mrs` took for analysis, cut and repair; the hours that trained the base are not counted. `cuts, branches`
has a longer analysis, which the table counts and this rival is not given.

Stopping rule: seeds 0 to 2 where 75 % of the MACs are removed, seed 0 at 50 and 90 %, of every arm and budget; no
figure is looked at to decide whether to go on. Test images choose nothing: clean accuracy and PGD-20 from one start on
the margin on 2,000 of them, `aa-fast` on the first 1,000 of these. Rows are stored one by one in a file for each base,
and the same command goes on with the missing ones. `latency` rebuilds the networks of seed 0 with random weights and
times their ONNX files side by side; run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import compression_plot
import compression_table
import torch
from attack_gap import survivors
from compression_table import SCRATCH, UNIFORM
from criteria import Arm, nearest_plan, with_sensitivities
from recovered import Base, images_seen, score_on
from recovery import CURVE
from torch import nn

import robust_prune as rp
from robust_prune.budget.analysis import Analysis, analyse, with_cut_losses
from robust_prune.budget.counting import count_macs, count_params
from robust_prune.budget.measured import Measured
from robust_prune.commands.common import open_data, open_model_for
from robust_prune.console import console
from robust_prune.data.base import DataBundle, ImageSet, random_subset, stratified
from robust_prune.errors import QualityGateError
from robust_prune.exporters.onnx import export_model
from robust_prune.exporters.precision import Precision, export_precisions, reduced_path
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.device import choose_device
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.models.artifact import Model
from robust_prune.models.manifest import apply_changes, describe_changes
from robust_prune.models.registry import build
from robust_prune.models.spec import ModelSpec
from robust_prune.ranking.importance import channel_scores, removed_fraction_curve
from robust_prune.recipe import EvaluationSection, ExportSection, Recipe, TrainSettings
from robust_prune.recipe_reader import load
from robust_prune.runs.files import write_json, write_text
from robust_prune.sensitivity.adversarial_set import AdversarialSet
from robust_prune.structure.paths import sample_images
from robust_prune.surgery.apply import apply
from robust_prune.surgery.batchnorm import reestimate_batchnorm
from robust_prune.surgery.repair import repair, repair_set
from robust_prune.training.scratch import fresh_like

RESULTS = Path(__file__).parent / "results"
IMAGES, JUDGED = 2000, 1000
"""Test images of PGD-20 and of `aa-fast`."""
PRECISIONS: tuple[Precision, ...] = ("int8",)


@dataclass(frozen=True)
class Source:
    """A robust base.

    Attributes:
        recipe: its recipe, with data, threat model and settings of fine-tuning.
        weights: a model file, or ``demo``.
    """

    recipe: str
    weights: str


def _stored(recipe: str) -> Source:
    return Source(recipe, str(RESULTS / recipe / "train" / "model.safetensors"))


BASES = {
    "resnet20_x2": Source("cifar10-resnet20x2", "demo"),
    "vgg16_bn_x0.5": _stored("cifar10-vgg16_bn_x0.5"),
    "mobilevit_xs_x0.25": _stored("cifar10-mobilevit_xs_x0.25"),
    "fashion_mnist-resnet20": _stored("fashion_mnist-resnet20"),
}
ARMS = (
    Arm("mrs", "mrs", "adversarial_taylor"),
    Arm("cuts, branches", "cuts", "adversarial_taylor"),
    Arm("mrs, exponent 0", "mrs", "adversarial_taylor", exponent=0),
    Arm(UNIFORM, "uniform", "adversarial_taylor"),
    Arm("global adversarial Taylor, no MRS", "global", "adversarial_taylor", sensitivities="equal"),
    Arm("global magnitude, no MRS", "global", "magnitude", sensitivities="equal"),
    Arm(SCRATCH, "uniform", "adversarial_taylor"),
)
SEEDS = {0.5: (0,), 0.75: (0, 1, 2), 0.9: (0,)}
"""Seeds of the stopping rule by the share of the MACs removed."""

Cell = tuple[int, float, float, Arm]
"""Seed, share of the MACs removed, minutes of fine-tuning, arm."""


class Bench:
    """A base with what is measured once: analyses and their processor seconds for each seed, and the cuts."""

    def __init__(self, source: Source) -> None:
        self.recipe = load(source.recipe)
        self.data: DataBundle = open_data(self.recipe)
        self.loaded: Model = open_model_for(source.weights, self.data, self.recipe, None)
        self.device = choose_device(self.recipe.device)
        self._analyses: dict[tuple[int, str], tuple[Analysis, float]] = {}
        self._attacked: dict[int, AdversarialSet] = {}
        self._cuts: dict[tuple[int, float, str], tuple[nn.Module, dict[str, Any]]] = {}

    def settings(self) -> dict[str, Any]:
        """Return what all rows of the base have in common; rows of other settings are not comparable."""
        return {
            "model": models_hash(self.loaded.module), "data": self.data.name, "images": [IMAGES, JUDGED], "threads": 1,
            "scratch": CURVE[SCRATCH], "recipe": self.recipe.model_dump(mode="json", exclude={"seed", "device"}),
        }  # fmt: skip

    def analysis(self, seed: int, arm: Arm) -> tuple[Analysis, float]:
        """Return the analysis that an arm plans from, and the processor seconds that it takes."""
        module, spec, train = self.loaded.module, self.loaded.spec, self.data.train
        recipe = self.recipe.model_copy(update={"seed": seed})
        if (seed, "mrs") not in self._analyses:
            begin = time.process_time()
            found = analyse(Measured(module, spec, train, recipe, self.device))
            self._attacked[seed] = repair_set(module, train, recipe, self.device)
            self._analyses[seed, "mrs"] = found, time.process_time() - begin
        found, seconds = self._analyses[seed, "mrs"]
        if arm.allocation == "cuts":
            if (seed, "cuts") not in self._analyses:
                begin = time.process_time()
                cuts = with_cut_losses(found, Measured(module, spec, train, recipe, self.device))
                self._analyses[seed, "cuts"] = cuts, seconds + time.process_time() - begin
            return self._analyses[seed, "cuts"]
        if arm.criterion != found.criterion:
            groups = found.search.groups
            scores = channel_scores(module, groups, arm.criterion, seed=seed, device=self.device)
            removed = {g.name: removed_fraction_curve(module, g, scores[g.name]) for g in groups}
            found = replace(found, scores=scores, removed=removed, criterion=arm.criterion)
        return with_sensitivities(found, arm.sensitivities, seed), seconds

    def cut(self, seed: int, ratio: float, arm: Arm) -> tuple[nn.Module, dict[str, Any]]:
        """Return the base, cut and repaired, and what is stored of the cut; the model must not be changed."""
        place = seed, ratio, compression_table.network_of(arm.name)
        if place in self._cuts:
            return self._cuts[place]
        changes = {"ratio": ratio, "allocation": arm.allocation, "criterion": arm.criterion, "branches": True}
        section = self.recipe.pruning.model_copy(update={**changes, "mrs_exponent": arm.exponent})
        recipe = self.recipe.model_copy(update={"seed": seed, "pruning": section})
        (analysis, seconds), begin = self.analysis(seed, arm), time.process_time()
        plan, example = nearest_plan(analysis, section), self.loaded.spec.blank_image()
        surgery = apply(self.loaded.module.cpu(), plan, example, sample_images(self.data.train, seed))
        small = surgery.model
        repair(surgery, self.loaded.module, self.data.train, recipe, self.device, self._attacked[seed])
        macs = count_macs(small.cpu().eval(), example)
        self._cuts[place] = (
            small,
            {
                "macs": macs,
                "params": count_params(small),
                "macs_kept": macs / plan.macs_before,
                "round_to": plan.round_to,
                "widths": {group.name: [group.channels, group.keep] for group in plan.groups},
                "rolled_back": [asdict(group) for group in surgery.rolled_back],
                "changes": describe_changes(build(self.loaded.spec, pretrained=False), small),
                "analysis_seconds": seconds,
                "cut_seconds": time.process_time() - begin,
            },
        )
        return self._cuts[place]

    def row(self, stored: dict[str, Any], seed: int, ratio: float, minutes: float, arm: Arm) -> dict[str, Any]:
        """Return one row: the cut, its fine-tuning and its accuracies."""
        small, cut = self.cut(seed, ratio, arm)
        recipe = self.recipe.model_copy(update={"seed": seed})
        base = Base(small, self.loaded.module, self.loaded.spec, self.data, self.device)
        settings: TrainSettings = recipe.finetune
        trained, begin = 0, time.process_time()
        if arm.name == SCRATCH:
            base, settings = base.fresh(seed), recipe.training.model_copy(update=CURVE[SCRATCH])
            (mrs,) = (row for row in stored["rows"] if key(row) == (seed, ratio, minutes, "mrs"))
            minutes += (mrs["analysis_seconds"] + mrs["cut_seconds"]) / 60
        if minutes:
            paced = recipe.model_copy(update={"pruning": recipe.pruning.model_copy(update={"ratio": ratio})})
            epochs, count = images_seen(stored, base, settings, paced, minutes)
            chosen_on = random_subset(self.data.validation, settings.validation_images, 0)
            settings, trained = settings.model_copy(update={"epochs": epochs}), epochs * count
            begin = time.process_time()
            small, _ = base.trained(settings, recipe, count, chosen_on)
        seconds = time.process_time() - begin
        return cut | {"images": trained, "train_seconds": seconds} | judged(small.cpu().eval(), self.data, recipe)


def judged(small: nn.Module, data: DataBundle, recipe: Recipe) -> dict[str, Any]:
    """Return which test images a model classifies correctly: clean, under PGD-20 and under `aa-fast`."""
    device = choose_device(recipe.device)
    pgd = score_on(small, stratified(data.test, IMAGES), "test", data, recipe, device)
    with TemporaryDirectory() as folder:
        few = stratified(data.test, JUDGED)
        found = survivors(small, few, recipe, EvaluationSection(tier="aa-fast"), Path(folder) / "state.npz")
    return {"pgd": pgd, "aa_fast": {"images": len(few), "robust": found["after_all"]}, "flags": found["flags"]}


def key(row: dict[str, Any]) -> tuple[int, float, float, str]:
    """Return seed, share of the MACs removed, minutes of fine-tuning, and name of the arm of a row."""
    return row["seed"], row["ratio"], row["minutes"], row["arm"]


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield the wanted cells, seed by seed; `mrs` comes before the small network that trains for as long."""
    wanted = {*(args.arms or (arm.name for arm in ARMS))}
    wanted |= {"mrs"} if SCRATCH in wanted else set()
    for seed in sorted({seed for ratio in args.ratios for seed in SEEDS[ratio]}):
        for ratio in (ratio for ratio in args.ratios if seed in SEEDS[ratio]):
            for minutes in args.minutes:
                for arm in (arm for arm in ARMS if arm.name in wanted):
                    yield seed, ratio, minutes, arm


def read(file: Path) -> dict[str, Any]:
    """Return the stored results of a base; without rows if there are none yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}


def check(stored: dict[str, Any], settings: dict[str, Any], file: Path) -> None:
    """Keep the settings of the rows, and stop if rows are of other settings."""
    if stored.setdefault("settings", settings) != settings:
        differ = [name for name, value in settings.items() if stored["settings"].get(name) != value]
        raise SystemExit(f"{file} has rows of other settings ({', '.join(differ)}). Move it away or use --out.")


def rows(args: argparse.Namespace, file: Path) -> None:
    """Measure the missing rows of a base and store each."""
    have = {key(row) for row in read(file)["rows"]}
    todo = [(s, r, m, arm) for s, r, m, arm in cells(args) if (s, r, m, arm.name) not in have]
    if not todo:
        return
    bench, environment = Bench(BASES[args.base]), snapshot()
    for position, (seed, ratio, minutes, arm) in enumerate(todo, start=1):
        stored = read(file)  # another process may have written rows of other ratios
        check(stored, bench.settings(), file)
        cell = {"seed": seed, "ratio": ratio, "minutes": minutes, "arm": arm.name}
        row = cell | bench.row(stored, seed, ratio, minutes, arm) | {"environment": environment}
        stored["rows"] = [*read(file)["rows"], row]
        write_json(file, stored)
        robust = 100 * compression_table.right(row, "aa_fast").mean()
        console.print(
            f"{position}/{len(todo)} seed {seed}, {100 * ratio:g} %, {minutes:g} min, {arm.name}: {robust:.1f} %",
            markup=False,
        )


def latency(args: argparse.Namespace, file: Path) -> None:
    """Time the ONNX files of the dense network and of each arm's cut of seed 0, side by side for each ratio."""
    stored, bench = read(file), Bench(BASES[args.base])
    check(stored, bench.settings(), file)
    spec, train = bench.loaded.spec, bench.data.train
    for ratio in args.ratios:
        cuts = {r["arm"]: r["changes"] for r in stored["rows"] if (r["seed"], r["ratio"]) == (0, ratio)}
        cuts.pop(SCRATCH, None)  # the network of the uniform cut
        if not cuts:
            continue
        files: dict[str, Path] = {}
        with TemporaryDirectory() as folder:
            for name, changes in {"dense": None, **cuts}.items():
                module = build(spec, pretrained=False)
                if changes is not None:
                    apply_changes(module, changes)
                small = fresh_like(spec, module, 0)
                reestimate_batchnorm(small, train)
                files |= exported(small.eval(), spec, train, name, Path(folder) / f"{len(files)}.onnx")
            table = rp.benchmark(files, batches=(1, 32), threads=(1,), kinds=("host",))
        found = [{name: value for name, value in asdict(row).items() if name != "path"} for row in table.rows]
        stored.setdefault("latency", {})[f"{ratio:g}"] = {"rows": found, "environment": table.environment}
        write_json(file, stored)


def exported(small: nn.Module, spec: ModelSpec, images: ImageSet, name: str, path: Path) -> dict[str, Path]:
    """Return the files of a network by label; without the int8 file if its logits are not those of the network."""
    section = ExportSection(precisions=PRECISIONS)
    export_model(small, spec, images, path, section, 0)
    try:
        reduced = export_precisions(small, images, path, section)
    except QualityGateError as error:
        console.print(f"{name}: no int8 file: {error}", markup=False)
        reduced = {}
    return {name: path, **{f"{name}, {precision}": reduced_path(path, precision) for precision in reduced}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "latency", "table"))
    parser.add_argument("base", nargs="?", choices=BASES, help="a base; not for the table, which has all")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0, 10.0], help="fine-tuning on one core")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS])
    parser.add_argument("--out", type=Path, default=RESULTS / "compression", help="folder of the rows")
    args = parser.parse_args(argv)
    tune_allocator()
    torch.set_num_threads(1)
    if args.what != "table":
        if args.base is None:
            parser.error(f"{args.what} needs a base: {', '.join(BASES)}")
        args.out.mkdir(parents=True, exist_ok=True)
        {"rows": rows, "latency": latency}[args.what](args, args.out / f"{args.base}.json")
    every = {name: read(path) for name in BASES if (path := args.out / f"{name}.json").exists()}
    text = compression_table.tables(every)
    write_text(args.out.with_suffix(".md"), text)
    if drawn := compression_plot.plot(every):
        write_text(args.out.with_suffix(".svg"), drawn)
    print(text)


if __name__ == "__main__":
    main()
