"""robust-prune compress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..catalogue import ALLOCATIONS, CRITERIA, LOSSES, TIERS
from ..console import console, warn
from ..recipe import RECOVERIES, Recovery
from .common import (
    DEMO,
    ArchFlag,
    DataFlag,
    DeviceFlag,
    ImagesFlag,
    RecipeFlag,
    SeedFlag,
    SetFlag,
    TrustFlag,
    check_functions,
    check_model_path,
    command_line,
    listed,
    open_data,
    open_model_for,
    resolve,
    run_name,
)


def compress(
    model: str,
    *,
    ratio: Annotated[str | None, Parameter(help="Share to remove, between 0 and 1.")] = None,
    metric: Annotated[str | None, Parameter(help="What the ratio counts: macs, params, channels or latency.")] = None,
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    out: Annotated[Path | None, Parameter(help="Run folder; runs/NAME-... by default.")] = None,
    arch: ArchFlag = None,
    recovery: Annotated[
        Recovery | None,
        Parameter(help="How long to fine-tune, and by which method; in place of what the recipe says."),
    ] = None,
    epochs: Annotated[int | None, Parameter(help="Fine-tuning epochs.")] = None,
    loss: Annotated[str | None, Parameter(help=f"Fine-tuning loss: {LOSSES.help()}.")] = None,
    baseline: Annotated[
        str | None,
        Parameter(
            help="scratch: also train the pruned architecture from fresh weights, for the time that fine-tuning took "
            "(--set baseline.minutes=10 for another), and show it in the table."
        ),
    ] = None,
    images: ImagesFlag = None,
    allocation: Annotated[str | None, Parameter(help=f"How the budget is spread: {ALLOCATIONS.help()}.")] = None,
    criterion: Annotated[
        str | None,
        Parameter(help=f"Channel score inside a group: {CRITERIA.help()}."),
    ] = None,
    cuts: Annotated[int | None, Parameter(help="Cuts that the ratio is spread over.")] = None,
    tier: Annotated[str | None, Parameter(help=f"Strength of the evaluation: {TIERS.help()}.")] = None,
    precision: Annotated[
        str | None, Parameter(help="Files to write beside the fp32 one: fp16, int8 or both, separated by a comma.")
    ] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Print the plan; write nothing.")] = False,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust_pickle: TrustFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Make a robust model smaller: measure, cut, fine-tune, evaluate, export, time, report.

    Parameters
    ----------
    model
        A model file, or "demo" for the embedded one.
    """
    flags = {
        "pruning.ratio": ratio,
        "pruning.metric": metric,
        "pruning.allocation": allocation,
        "pruning.criterion": criterion,
        "pruning.cuts": cuts,
        "data.name": data,
        "finetune.epochs": epochs,
        "finetune.loss": loss,
        "baseline.kind": baseline,
        "evaluation.images": images,
        "evaluation.tier": tier,
        "export.precisions": listed(precision),
        "seed": seed,
        "device": device,
    }
    preset = {f"finetune.{key}": value for key, value in RECOVERIES[recovery].items()} if recovery else {}
    given = preset | {key: value for key, value in flags.items() if value is not None}
    resolved = resolve(recipe, given, assignments, demo=model == DEMO)
    check_model_path(model)
    cut = resolved.pruning
    check_functions(resolved.finetune.loss, cut.criterion, cut.allocation, resolved.evaluation.tier)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, arch, trust_pickle)

    from ..compression import compress as run_compression
    from ..compression import plan_only
    from ..job import Compression
    from ..machine.host import tune_allocator

    tune_allocator()
    job = Compression(run_name(model), loaded, bundle, resolved, out, command_line(), arch)
    if not dry_run:
        run_compression(job)
        return
    plan_only(job)
    if resolved.pruning.cuts > 1:
        warn(f"this is the first of {resolved.pruning.cuts} cuts; the others are planned on the model that it leaves.")
    console.print("Dry run: nothing was written.")
