"""robust-prune compress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from ..catalogue import ALLOCATIONS, CRITERIA, LOSSES, TIERS
from ..console import console, warn
from ..recipe import RECOVERIES, Recovery
from .common import (
    DEMO,
    IMAGES_HELP,
    ArchFlag,
    DataFlag,
    DeviceFlag,
    EpsilonFlag,
    NormalizationFlag,
    NormFlag,
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
    with_threat_of,
)

PRUNING, RECOVERY, EVALUATION = map(Group.create_ordered, ("Pruning", "Recovery", "Evaluation and export"))


# More than eight parameters: one for each flag.
def compress(
    model: str,
    *,
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    out: Annotated[Path | None, Parameter(help="Run folder; by default runs/MODEL-METRIC-RATIO-HASH.")] = None,
    arch: ArchFlag = None,
    normalization: NormalizationFlag = None,
    ratio: Annotated[str | None, Parameter(group=PRUNING, help="Share to remove, between 0 and 1.")] = None,
    metric: Annotated[
        str | None, Parameter(group=PRUNING, help="What the ratio counts: macs, params, channels or latency.")
    ] = None,
    allocation: Annotated[
        str | None, Parameter(group=PRUNING, help=f"How the cut is spread over the groups: {ALLOCATIONS.help()}.")
    ] = None,
    criterion: Annotated[
        str | None, Parameter(group=PRUNING, help=f"Score of the channels within a group: {CRITERIA.help()}.")
    ] = None,
    cuts: Annotated[
        int | None, Parameter(group=PRUNING, help="Number of rounds of pruning and fine-tuning that share the ratio.")
    ] = None,
    dry_run: Annotated[bool, Parameter(group=PRUNING, negative="", help="Print the plan and write nothing.")] = False,
    epsilon: EpsilonFlag = None,
    norm: NormFlag = None,
    recovery: Annotated[
        Recovery | None,
        Parameter(group=RECOVERY, help="Preset for method and length of fine-tuning; replaces the recipe's."),
    ] = None,
    epochs: Annotated[int | None, Parameter(group=RECOVERY, help="Fine-tuning epochs.")] = None,
    loss: Annotated[str | None, Parameter(group=RECOVERY, help=f"Fine-tuning method: {LOSSES.help()}.")] = None,
    baseline: Annotated[
        str | None,
        Parameter(
            group=RECOVERY,
            help="With scratch, also train the pruned architecture from fresh weights for as long as fine-tuning took "
            "(or --set baseline.minutes=10), and add it to the table.",
        ),
    ] = None,
    tier: Annotated[str | None, Parameter(group=EVALUATION, help=f"Strength of the attacks: {TIERS.help()}.")] = None,
    images: Annotated[int | None, Parameter(group=EVALUATION, help=IMAGES_HELP)] = None,
    precision: Annotated[
        str | None,
        Parameter(group=EVALUATION, help="Further ONNX files beside the fp32 one: fp16, int8, or fp16,int8."),
    ] = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust_pickle: TrustFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Prune a robust model, fine-tune it, and report its robust accuracy and latency.

    Parameters
    ----------
    model
        A model file, or "demo" for the robust model that comes with the package.
    """
    flags = {
        "pruning.ratio": ratio,
        "pruning.metric": metric,
        "pruning.allocation": allocation,
        "pruning.criterion": criterion,
        "pruning.cuts": cuts,
        "threat.epsilon": epsilon,
        "threat.norm": norm,
        "data.name": data,
        "model.normalization": normalization,
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
    resolved = with_threat_of(loaded, resolved)

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
