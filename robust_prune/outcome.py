"""The last stages of a compression: latency and report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .bench.candidates import missed
from .bench.latency import run_section
from .bench.types import LatencyTable
from .budget.iterative import compose
from .evaluation.examples import make_examples
from .job import Compression, Judged
from .machine.snapshot import snapshot
from .models import artifact
from .recipe import Recipe
from .report.files import NAMES, write
from .report.rows import DENSE, PRUNED, SCRATCH, with_latency
from .report.types import ModelRow, RunReport
from .runs.run import Run
from .serialization import to_json

UNITS = {"macs": "MACs", "params": "parameters", "channels": "channels", "latency": "the latency"}


def benchmark(run: Run, rows: Sequence[ModelRow], recipe: Recipe) -> LatencyTable:
    """Run the stage that measures the latency of all files together."""
    files = [(row.label, row.onnx) for row in rows if row.onnx is not None]
    paths = [(label, Path(file.path)) for label, file in files]
    measure = partial(run_section, paths, recipe.bench, recipe.seed)
    return run.stage("bench", LatencyTable, [[label, file.sha256] for label, file in files], measure)


def report(job: Compression, run: Run, judged: Judged, table: LatencyTable) -> RunReport:
    """Run the stage that writes the report of a compression, and return the report."""
    recipe, section, cuts = job.recipe, job.recipe.pruning, judged.cuts
    rows, last, dense = with_latency(judged.rows, table), cuts[-1], run.folder / f"{DENSE}.safetensors"

    def make() -> RunReport:
        late = missed(table, recipe.bench, section.ratio) if section.metric == "latency" else ""
        made = RunReport(
            title=f"{job.name} compressed: {100 * section.ratio:.0f} % of {UNITS[section.metric]} removed",
            command=job.command,
            recipe=recipe.model_dump(mode="json"),
            notes=tuple(note for note in (*job.data.cautions, late, *judged.notes) if note),
            models=rows,
            profile=cuts[0].planned.profile,
            plan=compose([cut.plan for cut in cuts], section.ratio),
            rolled_back=last.pruned.rolled_back,
            history=last.tuned.history,
            start=last.tuned.start,
            environment=snapshot() | {"bench": table.environment},
            seconds=dict(run.seconds),
            latency_protocol=table.protocol,
            noise_floor=table.noise_floor,
            class_names=tuple(job.data.class_names),
        )
        examples = make_examples(
            {label: model.to(job.device) for label, model in judged.models.items() if label != SCRATCH},
            job.data.test, recipe.threat_model, job.data.class_names,
            attacked=PRUNED, seed=recipe.seed, device=job.device,
        )  # fmt: skip
        # For `report --reevaluate`; the other models have been written by the stages that made them.
        provenance = {"command": job.command}
        artifact.save(dense, job.dense.module.cpu(), job.dense.spec, threat=recipe.threat_model, provenance=provenance)
        write(made, run.folder, examples)
        return made

    files = [dense, *(run.folder / name for name in NAMES)]
    return run.stage("report", RunReport, to_json(rows), make, files=files)
