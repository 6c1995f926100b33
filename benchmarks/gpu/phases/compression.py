"""Compression of the base model to a half, a quarter and a tenth of its MACs by three methods, with evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from criteria import Arm, analyses, cut_and_recover, scored
from sizes import Sizes
from torch import nn
from work import Work

from robust_prune.bench import latency
from robust_prune.bench.providers import provider_problem
from robust_prune.budget.analysis import Analysis
from robust_prune.budget.plan import make_plan
from robust_prune.data.base import DataBundle, random_subset
from robust_prune.data.sources import load_data
from robust_prune.errors import RobustPruneError
from robust_prune.exporters.onnx import export_model
from robust_prune.introspect.fingerprint import models_hash
from robust_prune.machine.snapshot import snapshot
from robust_prune.models import artifact
from robust_prune.models.artifact import Model
from robust_prune.recipe import ExportSection, Recipe
from robust_prune.recipe_reader import load
from robust_prune.sensitivity.adversarial_set import make_adversarial_set
from robust_prune.serialization import to_json
from robust_prune.surgery.apply import apply

ARMS = (
    Arm("mrs", "mrs", "adversarial_taylor"),
    Arm("uniform, adversarial Taylor", "uniform", "adversarial_taylor"),
    # One threshold over magnitudes relative to the mean of their group; `_insensitive` removes MRS from it.
    Arm("global magnitude", "global", "magnitude"),
)
DENSE = "dense"
LATENCY_SECONDS = 40.0
"""Seconds reserved for exporting and timing the files at the end."""


def run(work: Work, sizes: Sizes, deadline: float) -> None:
    """Run all arms of one ratio before those of the next; a later job resumes with the missing ones."""
    base = work.newest_base()
    if base is None:
        reason = "there is no base: run the phase `base`, or pack one"
        work.save("compression", work.result("compression") | {"reason": reason})
        return
    loaded, data = artifact.load(base), load_data("cifar10")
    data = replace(data, train=random_subset(data.train, sizes.train_images, 0))
    recipe = load("cifar10-resnet18", {**sizes.compression, "device": sizes.device})
    found = work.result("compression")
    if found.get("model") != models_hash(loaded.module):
        found = {"model": models_hash(loaded.module), "arch": loaded.spec.arch, "rows": [], "latency": []}
    found |= {"environment": snapshot(), "recipe": recipe.model_dump(mode="json")}
    rows: list[dict[str, Any]] = found["rows"]
    have = {(row["name"], row.get("ratio")) for row in rows}
    if (DENSE, None) not in have:
        rows.append({"name": DENSE, "after": scored(loaded.module.cpu(), DENSE, data, recipe, sizes.device)})
        work.save("compression", found)
    by_arm = _analyses(loaded, data, recipe, sizes.device)
    adv = make_adversarial_set(
        loaded.module, data.train, recipe.threat_model, recipe.sensitivity, seed=recipe.seed, device=sizes.device
    )
    todo = [(ratio, arm) for ratio in sizes.ratios for arm in ARMS if (arm.name, ratio) not in have]
    took = 0.0
    while todo and time.monotonic() + took < deadline - LATENCY_SECONDS:
        (ratio, arm), begin = todo.pop(0), time.monotonic()
        small, row = cut_and_recover(arm, ratio, by_arm[arm.name], adv, loaded, data, recipe, sizes.device)
        rows.append({**row, "after": scored(small, arm.name, data, recipe, sizes.device)})
        took = time.monotonic() - begin
        work.save("compression", found)
    cuts = {row["ratio"] for row in rows if row["name"] == "mrs"}
    found["latency"] = _latency(work, sizes, loaded, data, recipe, by_arm["mrs"], sorted(cuts))
    work.save("compression", found, "partial" if todo else "done")


def _analyses(loaded: Model, data: DataBundle, recipe: Recipe, device: str) -> dict[str, Analysis]:
    """Return the analysis of each arm; groups, costs and MRS are measured once."""
    by_criterion = dict(analyses(loaded, data, recipe, device, criteria=[arm.criterion for arm in ARMS]))
    found = {arm.name: by_criterion[arm.criterion] for arm in ARMS}
    return {name: _insensitive(a) if name == "global magnitude" else a for name, a in found.items()}


def _insensitive(analysis: Analysis) -> Analysis:
    groups = tuple(replace(group, mrs=1.0) for group in analysis.profile.groups)
    return replace(analysis, profile=replace(analysis.profile, groups=groups))


def _latency(
    work: Work,
    sizes: Sizes,
    loaded: Model,
    data: DataBundle,
    recipe: Recipe,
    analysis: Analysis,
    ratios: Sequence[float],
) -> list[dict[str, Any]]:
    """Measure the dense file and those of new `mrs` cuts on GPU and CPU, since latency does not depend on weights."""
    models: dict[str, nn.Module] = {DENSE: loaded.module.cpu()}
    for ratio in ratios:
        plan = make_plan(analysis, recipe.pruning.model_copy(update={"ratio": ratio}))
        models[f"{100 * (1 - ratio):g} % mrs"] = apply(
            loaded.module.cpu(), plan, loaded.spec.blank_image()
        ).model  # fmt: skip
    files, tables = [], []
    for label, model in models.items():
        path = work.root / "compressed" / f"{label}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        export_model(model, loaded.spec, data.train, path, ExportSection(), 0)
        files.append((label, path))
    for provider, batches in (("cuda", (1, 256)), ("cpu", (1,))):
        if provider_problem(provider):
            continue
        try:
            measured = latency.run(
                files, batches=batches, provider=provider, seconds_budget=len(batches) * sizes.latency_seconds
            )
        except RobustPruneError as error:
            tables.append({"provider": provider, "reason": str(error), "rows": []})
            continue
        table = to_json(measured)
        tables.append({**table, "rows": [{k: v for k, v in row.items() if k != "path"} for row in table["rows"]]})
    return tables
