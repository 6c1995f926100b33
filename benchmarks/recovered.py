"""Common parts of the recovery benchmarks: the pruned model, its training, and its correct predictions."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from robust_prune.budget.analysis import analyse
from robust_prune.budget.measured import Measured
from robust_prune.budget.plan import make_plan
from robust_prune.data.base import DataBundle, ImageSet, random_subset, stratified
from robust_prune.evaluation.evaluate import Subject, evaluate
from robust_prune.machine.device import choose_device
from robust_prune.models.artifact import Model
from robust_prune.models.spec import ModelSpec
from robust_prune.recipe import EvaluationSection, Recipe, TrainSettings
from robust_prune.surgery.apply import apply
from robust_prune.surgery.repair import repair
from robust_prune.training.affordable import affordable
from robust_prune.training.scratch import fresh_like
from robust_prune.training.trainer import train

RESAMPLES = 2000
ATTACK = "PGD-20, 1 random restart, margin"
"""Attack of `score_on`."""


@dataclass(frozen=True)
class Base:
    """The pruned model from which every method starts, its dense model and specification, the data and the device."""

    cut: nn.Module
    dense: nn.Module
    spec: ModelSpec
    data: DataBundle
    device: str

    def fresh(self, seed: int) -> Base:
        """Return the base with fresh weights in the pruned model."""
        return replace(self, cut=fresh_like(self.spec, self.cut.cpu(), seed))

    def trained(
        self, settings: TrainSettings, recipe: Recipe, count: int, chosen_on: ImageSet
    ) -> tuple[nn.Module, float]:
        """Return a copy trained on `count` images, and the seconds of its training steps."""
        small = copy.deepcopy(self.cut)
        result = train(
            small, random_subset(self.data.train, count, recipe.seed), chosen_on, recipe.threat_model, settings,
            seed=recipe.seed, device=self.device, teacher=self.dense,
        )  # fmt: skip
        return small.cpu().eval(), sum(record.seconds for record in result.history)


def cut_base(loaded: Model, data: DataBundle, recipe: Recipe) -> Base:
    """Return the base, pruned and repaired by the settings of the recipe."""
    device, dense = choose_device(recipe.device), loaded.module
    analysis = analyse(Measured(dense, loaded.spec, data.train, recipe, device))
    surgery = apply(dense.cpu(), make_plan(analysis, recipe.pruning), loaded.spec.blank_image())
    repair(surgery, dense, data.train, recipe, device)
    return Base(surgery.model, dense, loaded.spec, data, device)


def images_seen(
    stored: dict[str, Any], base: Base, settings: TrainSettings, recipe: Recipe, minutes: float
) -> tuple[int, int]:
    """Return the smallest number of epochs, and the number of images in each, of `minutes` of training.

    Steps of each kind are timed once, and the result is stored in `stored["steps_a_minute"]`. Methods whose steps cost
    the same thus see the same number of images. With one thread minutes are those of the processor, whatever else runs.
    """
    kind = f"{recipe.pruning.ratio:g} {settings.loss} {settings.steps if settings.loss != 'n_fgsm' else 1}"
    kind += f"{' distilled' if settings.distillation else ''}{' awp' if settings.awp else ''} {settings.batch_size}"
    timed = stored.setdefault("steps_a_minute", {})
    if kind not in timed:
        wall, processor = time.monotonic(), time.process_time()
        epochs, count = affordable(
            base.cut, base.data.train, recipe.threat_model, settings, 60.0, device=base.device, teacher=base.dense
        )  # fmt: skip
        wall, processor = time.monotonic() - wall, time.process_time() - processor
        alone = torch.get_num_threads() == 1 and base.device == "cpu"
        timed[kind] = epochs * count / settings.batch_size * (wall / processor if alone else 1)
    images = int(minutes * timed[kind] * settings.batch_size)
    epochs = math.ceil(images / len(base.data.train))
    return epochs, images // epochs


def scores(small: nn.Module, data: DataBundle, recipe: Recipe, device: str) -> dict[str, Any]:
    """Return which images are classified correctly, clean and attacked, by split, as packed bits."""
    splits = {"held-out": data.validation, "test": stratified(data.test, recipe.evaluation.images)}
    return {split: score_on(small, images, split, data, recipe, device) for split, images in splits.items()}


def score_on(
    small: nn.Module, images: ImageSet, split: str, data: DataBundle, recipe: Recipe, device: str
) -> dict[str, Any]:
    """Return which images are classified correctly, clean and under `ATTACK`, as packed bits."""
    with TemporaryDirectory() as folder:
        state = Path(folder) / "state.npz"
        evaluate(
            small.to(device), images, recipe.threat_model, EvaluationSection(restarts=1),
            subject=Subject("recovered", data.name, split), state_path=state,
        )  # fmt: skip
        with np.load(state) as found:
            bits = {name: np.packbits(found[name]).tobytes().hex() for name in ("clean", "robust")}
    return {"images": len(images), **bits}


def right_images(scored: dict[str, Any], which: str) -> np.ndarray:
    """Return 1.0 for each image that is classified correctly in a result of `score_on`, else 0.0."""
    bits = np.frombuffer(bytes.fromhex(scored[which]), np.uint8)
    return np.unpackbits(bits)[: scored["images"]].astype(float)


def machines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the processors and commits of rows as text; a commit with changes beside it is marked by a plus."""
    found = set()
    for row in rows:
        commit, _, changes = (row["environment"]["commit"] or "unknown").partition("+")
        found.add(f"{row['environment']['cpu']}, commit {commit[:7]}{'+' if changes else ''}")
    return "; ".join(sorted(found))


def machine(part: dict[str, Any], environment: dict[str, Any]) -> str:
    """Return threads, processor and device of a measurement as text."""
    threads = part["threads"]
    return f"{threads} thread{'' if threads == 1 else 's'} of {environment['cpu']} ({environment['device']})"


def paired(mine: np.ndarray, theirs: np.ndarray) -> str:
    """Return the paired difference in points and its 95 % interval over images."""
    each = 100 * (mine - theirs)
    half = 1.96 * each.std(ddof=1) / math.sqrt(len(each))
    return f"{each.mean():+.1f} [{each.mean() - half:+.1f}, {each.mean() + half:+.1f}]"


def by_seed(rows: Sequence[dict[str, Any]], split: str, which: str = "robust") -> dict[int, np.ndarray]:
    """Return the correctly classified images of each seed."""
    return {row["seed"]: right_images(row[split], which) for row in rows}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `values` [seeds, images], over seeds and images."""
    generator = np.random.default_rng(0)
    seeds, images = values.shape
    means = []
    for _ in range(RESAMPLES):
        drawn = values[generator.integers(0, seeds, seeds)].mean(0)
        means.append(drawn[generator.integers(0, images, images)].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def difference(mine: dict[int, np.ndarray], theirs: dict[int, np.ndarray]) -> str:
    """Return the mean difference in points over common seeds, and its 95 % interval over seeds and images."""
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return ""
    values = 100 * np.stack([mine[seed] - theirs[seed] for seed in shared])
    low, high = interval(values)
    return f"{values.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
