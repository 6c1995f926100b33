"""`train`: a robust model from scratch, evaluated on the test split, with a report."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import __version__, distributed, stages
from .budget.counting import count_macs, count_params
from .console import console
from .data.base import DataBundle
from .errors import UsageError
from .evaluation.hashing import images_hash, models_hash
from .machine.snapshot import snapshot
from .models import artifact, registry, user_file
from .pipeline import SAMPLE_NOTE
from .recipe import Recipe
from .report.files import write as write_report
from .report.table import headline_table
from .report.types import ModelRow, RunReport
from .runs.files import RunDir, claim, digest, finite, write_json, write_text
from .runs.job import StageLog, warn


def run(name: str, data: DataBundle, recipe: Recipe, folder: Path, command: str) -> RunReport | None:
    """Trains, evaluates and reports; what an earlier, killed run did is not done again.

    Of several processes (see `processes`) only the first one returns the report.

    Raises:
        UsageError: an unknown architecture, or a folder that holds another run.
        QualityGateError: training diverged.
    """
    device, threat = stages.device_of(recipe), stages.threat_of(recipe)
    if recipe.model.arch is None:
        raise UsageError("the recipe names no architecture. Set model.arch.")
    spec = registry.make_spec(
        recipe.model.arch,
        num_classes=data.num_classes,
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
        kwargs=recipe.model.kwargs,
        class_names=data.class_names,
    )
    torch.manual_seed(recipe.seed)
    model = registry.build(spec)
    settings = recipe.model_dump(mode="json", include={"seed", "data", "threat", "model", "training", "evaluation"})
    images = [images_hash(part) for part in (data.train, data.validation, data.test)]
    key = claim(
        folder,
        digest([spec.to_json(), images, settings, user_file.versions(recipe.training.loss), __version__]),
        command,
    )
    log, final = StageLog(RunDir(folder), key), folder / "model.safetensors"
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_json(folder / "environment.json", snapshot())

    def make_model() -> dict[str, Any]:
        result = stages.finetune(
            model, data, threat, recipe.training,
            seed=recipe.seed, device=device, checkpoint=folder / "train" / "checkpoint.pt",
        )  # fmt: skip
        provenance = {"command": command, "recipe": digest(settings)}
        artifact.save(final, model.cpu(), registry.without_pretrained(spec), threat=threat, provenance=provenance)
        return finite(result.to_json())

    trained = log.once("train", None, make_model, (final,), together=True)
    warn(trained["note"])
    best = artifact.load(final, trust_source=True).model

    def make_card() -> dict[str, Any]:
        found = stages.evaluate_model(
            best, data, threat, recipe.evaluation,
            name=name, seed=recipe.seed, device=device, state_path=folder / "evaluate" / "state.npz",
            together=True,
        )  # fmt: skip
        return {"card": found.card.to_json(), "onnx_clean": None, "onnx_robust": None}

    found = log.once("evaluate", models_hash(best), make_card, together=True)
    if not distributed.part():
        return None
    row = ModelRow.from_json(
        {
            "label": "trained",
            "macs": count_macs(best, stages.blank_image(spec)),
            "params": count_params(best),
            "file_bytes": None,
            "onnx": None,
            "latency": [],
            **found,
        }
    )
    report = RunReport(
        title=f"{name}: adversarial training ({recipe.training.loss})",
        command=command,
        recipe=recipe.model_dump(mode="json"),
        notes=((SAMPLE_NOTE,) if data.sample else ()) + data.notes,
        models=(row,),
        history=tuple(trained["history"]),
        environment=snapshot(),
        seconds=log.seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
    )
    write_report(report, folder)
    console.print(headline_table(report))
    console.print(f"{final}  {folder / 'report.html'}", markup=False)
    return report
