"""A budget in latency: cuts are made, exported and timed on this machine until one is as fast as was asked.

MACs say little about time on a given machine, so no model of latency stands in for the clock. A cut of some share of
the MACs is planned as usual and carried out, the file is timed against the dense model's in interleaved blocks, and the
next share follows from where the wanted latency lies between the cuts that were too slow and those that were not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from .. import stages
from ..bench.latency import run as measure_latency
from ..bench.types import LatencyTable
from ..console import console
from ..recipe import BenchSection
from ..runs.job import Job
from ..surgery.apply import apply
from .types import PruningPlan

TOLERANCE = 0.05
"""A latency within this share of the wanted one keeps the budget."""

AIM = 0.02
"""The search goes on until it is this close, so that the final measurement still keeps the budget."""

MOST_CANDIDATES = 8
MOST_REMOVED = 0.99
NARROW = 0.004
SECONDS_SHARE = 0.5


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Attributes:
        removed: share of the model's MACs that it removes, in [0, 1).
        kept: its latency over that of the dense model, > 0.
    """

    removed: float
    kept: float


def next_share(tried: Sequence[Tried], wanted: float) -> float | None:
    """The share of the MACs to remove next, or None where the search ends.

    It ends within `AIM` of the wanted latency, after `MOST_CANDIDATES`, or when the candidates on either side of it are
    so close to each other that the structure has nothing between them.

    Args:
        tried: at least one candidate, in the order in which they were measured.
        wanted: latency over that of the dense model, in (0, 1).
    """
    if min(abs(t.kept / wanted - 1) for t in tried) <= AIM or len(tried) > MOST_CANDIDATES:
        return None
    slow = max((t for t in tried if t.kept > wanted), key=lambda t: t.removed, default=None)
    fast = min((t for t in tried if t.kept <= wanted), key=lambda t: t.removed, default=None)
    if slow is None:
        return None
    if fast is None:
        if slow.removed >= MOST_REMOVED:
            return None
        return min(1 - (1 - slow.removed) * wanted / slow.kept, MOST_REMOVED)
    width = fast.removed - slow.removed
    if width < NARROW:
        return None
    share = (slow.kept - wanted) / (slow.kept - fast.kept)
    # A candidate next to one that is known narrows nothing, whatever the line through the two says.
    return slow.removed + width * min(max(share, 0.1), 0.9)


def plan_for_latency(job: Job, model: nn.Module, analysis: stages.Analysis, wanted: float) -> PruningPlan:
    """The plan whose exported file comes nearest to `wanted` times the latency of the job's dense model.

    Timed is the first batch size and thread count of the recipe's ``bench`` section.

    Args:
        job: its dense model is what is compared with.
        model: what is cut: the dense model, or what earlier cuts left of it.
        analysis: of `model`.
        wanted: in (0, 1).

    Returns:
        The plan, with a note where no candidate came within `TOLERANCE`.

    Raises:
        UsageError: nothing can be cut.
        QualityGateError: a candidate's surgery or export is not what it should be.
    """
    section, bench = job.recipe.pruning, job.recipe.bench
    console.print(f"Looking for {wanted:.0%} of the dense latency ({conditions(bench)})", markup=False)
    with TemporaryDirectory() as folder:
        dense, file = Path(folder) / "dense.onnx", Path(folder) / "candidate.onnx"
        _export(job, job.loaded.model, dense)
        first = model is job.loaded.model
        tried = [Tried(0.0, 1.0 if first else _kept(job, model, dense, file))]
        plans: list[PruningPlan] = []
        while (share := next_share(tried, wanted)) is not None:
            plan = stages.plan_cut(analysis, section.model_copy(update={"of": "macs", "ratio": share}))
            if any(plan.groups == other.groups for other in plans):
                break
            small = apply(model.cpu(), plan, stages.blank_image(job.loaded.spec)).model
            plans.append(plan)
            removed = 1 - plan.macs_after / plan.macs_before
            tried.append(Tried(removed, _kept(job, small, dense, file)))
            console.print(f"  {removed:.1%} of the MACs removed: {tried[-1].kept:.1%} of the latency", markup=False)
            if plan.note and tried[-1].kept > wanted:
                break  # not even the most that can be cut is fast enough
    if not plans:  # an earlier cut is as fast as was asked already; the smallest step that there is
        plans.append(stages.plan_cut(analysis, section.model_copy(update={"of": "macs", "ratio": NARROW})))
        tried.append(tried[0])
    best, kept = min(zip(plans, (t.kept for t in tried[1:]), strict=True), key=lambda pair: abs(pair[1] / wanted - 1))
    note = ""
    if abs(kept / wanted - 1) > TOLERANCE:
        note = (
            f"asked for {wanted:.1%} of the dense latency ({conditions(bench)}), the nearest that was found is "
            f"{kept:.1%}. {best.note}"
        ).strip()
    return replace(best, ratio=section.ratio, of="latency", note=note)


def conditions(bench: BenchSection) -> str:
    """What a latency budget is measured under, in words."""
    threads = bench.threads[0]
    return f"batch {bench.batches[0]}, {threads} thread{'' if threads == 1 else 's'}, {bench.provider}"


def missed(table: LatencyTable, bench: BenchSection, ratio: float) -> str:
    """A sentence if the final measurement does not keep the budget, else an empty string.

    Args:
        table: with rows labelled ``pruned``.
        bench: that the budget was measured under.
        ratio: share of the latency to remove.
    """
    for row in table.rows:
        same = row.batch == bench.batches[0] and row.threads == bench.threads[0]
        if row.label == "pruned" and same and row.speedup is not None:
            kept = 1 / row.speedup.value
            if abs(kept / (1 - ratio) - 1) > TOLERANCE:
                return (
                    f"the final file takes {kept:.1%} of the dense latency ({conditions(bench)}), "
                    f"{1 - ratio:.1%} was asked for."
                )
    return ""


def _export(job: Job, model: nn.Module, path: Path) -> None:
    stages.export(model, job.loaded.spec, job.data, path, job.recipe.export.opset, job.recipe.seed)


def _kept(job: Job, model: nn.Module, dense: Path, file: Path) -> float:
    bench = job.recipe.bench
    _export(job, model, file)
    table = measure_latency(
        [("dense", dense), ("candidate", file)],
        batches=bench.batches[:1],
        threads=bench.threads[:1],
        provider=bench.provider,
        kinds=bench.kinds[:1],
        seconds_budget=bench.seconds * SECONDS_SHARE,
        seed=job.recipe.seed,
    )
    speedup = table.rows[1].speedup
    assert speedup is not None
    return 1 / speedup.value
