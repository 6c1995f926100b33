"""The rival of a cut: the pruned architecture, trained from fresh weights for as long as fine-tuning took."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .data.base import random_subset
from .introspect.fingerprint import models_hash
from .job import Compression, Cut, Length, reopen
from .models import artifact
from .report.rows import SCRATCH
from .runs.run import Run
from .serialization import to_json
from .training.affordable import affordable
from .training.scratch import fresh_like
from .training.trainer import train
from .training.types import TrainResult


def train_from_scratch(job: Compression, run: Run, pruned: nn.Module, cuts: Sequence[Cut]) -> tuple[nn.Module, str]:
    """Train the pruned architecture from fresh weights; return the model and a sentence on its training."""
    recipe, spec, file = job.recipe, job.dense.spec, run.folder / f"{SCRATCH}.safetensors"
    recovery = sum(record.seconds for cut in cuts for record in cut.tuned.history)
    minutes, identity = recipe.baseline.minutes, models_hash(pruned)
    seconds = recovery if minutes is None else 60 * minutes

    def measure_length() -> Length:
        model = fresh_like(spec, pruned, recipe.seed)
        settings, threat = recipe.training, recipe.threat_model
        return Length(*affordable(model, job.data.train, threat, settings, seconds, device=job.device))

    # A separate stage, so that a resumed run does not time the machine again and train for another length.
    length = run.stage(f"{SCRATCH}-length", Length, [identity, seconds], measure_length, shared=True)

    def make() -> TrainResult:
        model = fresh_like(spec, pruned, recipe.seed)
        result = train(
            model, random_subset(job.data.train, length.images, recipe.seed), job.data.validation, recipe.threat_model,
            recipe.training.model_copy(update={"epochs": length.epochs}),
            seed=recipe.seed, device=job.device, checkpoint=run.folder / SCRATCH / "checkpoint.pt",
        )  # fmt: skip
        artifact.save(file, model.cpu(), spec, threat=recipe.threat_model, provenance={"command": job.command})
        return result

    result = run.stage(SCRATCH, TrainResult, [identity, to_json(length)], make, files=[file], shared=True)
    took = sum(record.seconds for record in result.history)
    epochs = f"{length.epochs} epoch{'' if length.epochs == 1 else 's'}"
    note = (
        f"{SCRATCH}: the pruned architecture from fresh weights, trained by {recipe.training.loss} for {took:.0f} s "
        f"({epochs} of {length.images:,} images); fine-tuning the pruned model took {recovery:.0f} s. {result.note}"
    )
    return reopen(job, file).eval(), note.strip()
