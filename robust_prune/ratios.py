"""The frontier: a model for each of several ratios, in one table and one plot of latency against robust accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from . import distributed
from .bench.latency import check_section
from .bench.types import LatencyTable
from .compression import judge, open_run
from .console import console, warn, working
from .errors import QualityGateError, UsageError
from .exporters.parity import check_enough_images
from .job import Compressed, Compression, Judged
from .machine.device import choose_device
from .machine.snapshot import snapshot
from .outcome import UNITS, benchmark, report
from .report.files import NAMES, write
from .report.rows import DENSE, PRUNED, with_latency
from .report.terminal import show_end
from .report.types import ModelRow, RunReport
from .runs.cache import Cache
from .runs.run import RECORD, Run, RunInputs
from .serialization import to_json

RATIOS = (0.3, 0.5, 0.75, 0.9)
FILES = {"report.html": "all models in one page"}
STAGES = {"bench": "Latency of all models, measured together", "report": "Report on all models"}


@dataclass(frozen=True)
class Point:
    """A model of the frontier: its compression, the run that made it, and what is known of it."""

    job: Compression
    run: Run
    judged: Judged

    @property
    def labels(self) -> dict[str, str]:
        """Names in the frontier of the pruned model and its files, by their names in the run."""
        name, own = label(self.job), [row.label for row in self.judged.rows if row.label != DENSE]
        return {each: " ".join((name, *each.removeprefix(PRUNED).split())) for each in own}

    def rows(self) -> list[ModelRow]:
        """Return the rows of the pruned model and its files, as the frontier names them."""
        names = self.labels
        return [replace(row, label=names[row.label]) for row in self.judged.rows if row.label in names]

    def latency(self, table: LatencyTable) -> LatencyTable:
        """Return the rows of the dense model and of this point from a table of the frontier, as the run names them."""
        names = {joint: own for own, joint in self.labels.items()} | {DENSE: DENSE}
        rows = [replace(row, label=names[row.label]) for row in table.rows if row.label in names]
        return replace(table, rows=tuple(rows))


@working("Computing the frontier")
def frontier(job: Compression, ratios: Sequence[float] = RATIOS) -> Compressed | None:
    """Compress a model by each ratio, and time all models together.

    Each ratio is a run in a folder of its own below that of the frontier, which shares the measurements of the dense
    model through the cache. The report of the frontier is written after each ratio, without latency, and with it at the
    end. A ratio whose model fails a check is named and left out, unless it is the first. In a distributed run only the
    first process returns the result, as in `compress`.

    Args:
        job: the compression; its own ratio is not used.
        ratios: shares to remove, each in (0, 1).

    Raises:
        UsageError, QualityGateError, EnvironmentProblem: as `compress`.
    """
    check_section(job.recipe.bench)
    check_enough_images(job.data.train, job.data.name)
    choose_device(job.recipe.device)
    ordered = distinct(ratios)
    with ExitStack() as open_runs:
        run = open_runs.enter_context(_open(job))
        points: list[Point] = []
        lost: list[str] = []
        for number, ratio in enumerate(ordered, start=1):
            part = point(job, run, ratio)
            console.print(f"{label(part)} ({number} of {len(ordered)})", markup=False, style="bold")
            try:
                inner = open_runs.enter_context(open_run(part, without={"bench"}))
                points.append(Point(part, inner, judge(part, inner)))
            except QualityGateError as error:
                if not points or distributed.count() > 1:
                    raise
                lost.append(f"{label(part)}: {error}")
                warn(lost[-1])
                continue
            if inner.made and distributed.is_first():
                # The files are then no longer those of the stage that wrote them.
                (run.folder / "report" / RECORD).unlink(missing_ok=True)
                write(_joint(job, points, lost, None), run.folder)
        if not distributed.leave_group():
            return None
        table = benchmark(run, _rows(points), job.recipe)
        for one in points:
            report(one.job, one.run, one.judged, one.latency(table))
        names = {one.run.folder.name for one in points}
        others = sorted(
            path.parent.name for path in run.folder.glob("*/model.safetensors") if path.parent.name not in names
        )
        if others:
            warn(
                f"{run.folder} also holds {', '.join(others)}, which the report leaves out: give all ratios to see all."
            )
        joint = run.stage(
            "report", RunReport, to_json(with_latency(_rows(points), table)),
            lambda: _written(_joint(job, points, lost, table), run.folder),
            files=[run.folder / name for name in NAMES],
        )  # fmt: skip
        models = {f"{one.run.folder.name}/model.onnx": label(one.job) for one in points}
        show_end(joint, run, FILES | models)
        return Compressed(joint, run.folder)


def distinct(ratios: Sequence[float]) -> list[float]:
    """Return ratios in ascending order, each once, to a hundredth of a percent, which names their folders.

    Raises:
        UsageError: one is nearer to 0 or 1 than that.
    """
    found = sorted({round(ratio, 4) for ratio in ratios})
    if not 0 < found[0] <= found[-1] < 1:
        raise UsageError(f"ratios must be from 0.0001 to 0.9999, got {', '.join(f'{ratio:g}' for ratio in ratios)}.")
    return found


def label(job: Compression) -> str:
    """Return the name of a model of the frontier, such as ``cut by 50 %``."""
    return f"cut by {100 * job.recipe.pruning.ratio:g} %"


def _open(job: Compression) -> Run:
    """Claim the folder of the frontier, which later calls may extend by other ratios.

    Raises:
        UsageError, EnvironmentProblem: as `Run.open`.
    """
    recipe = job.recipe.model_dump(mode="json")
    del recipe["pruning"]["ratio"]
    inputs = RunInputs.of(*job.identity, recipe, job.code)
    folder = job.out or Path("runs") / f"{job.name}-frontier-{inputs.key[:6]}"
    return Run.open(folder, inputs, job.recipe, job.command, STAGES)


def point(job: Compression, run: Run, ratio: float) -> Compression:
    """Return the compression by one ratio; without a cache of the user's the folder has one, or nothing was shared."""
    cache = job.cache if job.cache.folder is not None else Cache(run.folder / "cache")
    return replace(job.at(ratio), out=run.folder / f"{100 * ratio:g}", cache=cache)


def _rows(points: Sequence[Point]) -> list[ModelRow]:
    dense = [row for row in points[0].judged.rows if row.label == DENSE]
    return [*dense, *(row for one in points for row in one.rows())]


def _written(made: RunReport, folder: Path) -> RunReport:
    write(made, folder)
    return made


def _joint(job: Compression, points: Sequence[Point], lost: Sequence[str], table: LatencyTable | None) -> RunReport:
    unit, shares = UNITS[job.recipe.pruning.metric], [f"{100 * one.job.recipe.pruning.ratio:g}" for one in points]
    rows = _rows(points)
    seconds: Mapping[str, float] = {label(one.job): sum(one.run.seconds.values()) for one in points}
    notes = [*job.data.cautions, *(note for one in points for note in one.judged.notes), *lost]
    return RunReport(
        title=f"{job.name} compressed: {', '.join(shares)} % of {unit} removed",
        command=job.command,
        recipe=job.recipe.model_dump(mode="json"),
        notes=tuple(dict.fromkeys(note for note in notes if note)),
        models=tuple(rows) if table is None else with_latency(rows, table),
        environment=snapshot() | ({} if table is None else {"bench": table.environment}),
        seconds=dict(seconds),
        latency_protocol="" if table is None else table.protocol,
        noise_floor={} if table is None else table.noise_floor,
        class_names=tuple(job.data.class_names),
    )
