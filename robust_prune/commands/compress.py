"""robust-prune compress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..catalogue import ALLOCATIONS, CRITERIA, LOSSES
from ..console import console, warn, working
from ..recipe import RECOVERIES, Recovery
from .common import (
    DEMO,
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
from .flags import (
    PRUNING,
    RECOVERY,
    RUN,
    ArchFlag,
    CacheFlag,
    DataFlag,
    DeviceFlag,
    EpsilonFlag,
    ImagesFlag,
    ModelArgument,
    NormalizationFlag,
    NormFlag,
    PrecisionFlag,
    RecipeFlag,
    SeedFlag,
    SetFlag,
    TierFlag,
    TrustCodeFlag,
    TrustFlag,
    of_recipe,
    stated,
)
from .next_steps import after_compress


# More than eight parameters: one for each flag.
def compress(
    model: ModelArgument,
    /,
    *,
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    out: Annotated[
        Path | None, Parameter(group=RUN, help="Run folder.", show_default=stated("runs/MODEL-METRIC-RATIO-HASH"))
    ] = None,
    arch: ArchFlag = None,
    normalization: NormalizationFlag = None,
    ratio: Annotated[
        str | None, of_recipe(PRUNING, "pruning.ratio", "Share to remove, between 0 and 1: 0.5 removes half.")
    ] = None,
    metric: Annotated[
        str | None,
        of_recipe(
            PRUNING,
            "pruning.metric",
            "What the ratio counts: macs (multiply-accumulates), params, channels, or latency (of the exported file on "
            "this machine).",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        of_recipe(PRUNING, "pruning.allocation", f"How the cut is spread over the groups: {ALLOCATIONS.help()}."),
    ] = None,
    criterion: Annotated[
        str | None,
        of_recipe(PRUNING, "pruning.criterion", f"Score of the channels within a group: {CRITERIA.help()}."),
    ] = None,
    cuts: Annotated[
        int | None,
        of_recipe(PRUNING, "pruning.cuts", "Number of rounds of pruning and fine-tuning that share the ratio."),
    ] = None,
    dry_run: Annotated[
        bool, Parameter(group=RUN, negative="", help="Print the plan, and write no run folder.", show_default=False)
    ] = False,
    epsilon: EpsilonFlag = None,
    norm: NormFlag = None,
    recovery: Annotated[
        Recovery | None,
        Parameter(
            group=RECOVERY,
            help="Preset for method and length of fine-tuning.",
            show_default=stated("what the recipe says"),
        ),
    ] = None,
    epochs: Annotated[
        int | None, of_recipe(RECOVERY, "finetune.epochs", "Passes over the training images in fine-tuning.")
    ] = None,
    loss: Annotated[str | None, of_recipe(RECOVERY, "finetune.loss", f"Fine-tuning method: {LOSSES.help()}.")] = None,
    baseline: Annotated[
        str | None,
        of_recipe(
            RECOVERY,
            "baseline.kind",
            "With scratch, also train the pruned architecture from fresh weights for as long as fine-tuning took "
            "(or --set baseline.minutes=10), and add it to the table.",
        ),
    ] = None,
    tier: TierFlag = None,
    images: ImagesFlag = None,
    precision: PrecisionFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    cache: CacheFlag = None,
    trust_pickle: TrustFlag = False,
    trust_code: TrustCodeFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Prune a robust model, fine-tune it, and report its robust accuracy and latency."""
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
    resolved = resolve(recipe, given, assignments, demo=model == DEMO, trust_code=trust_code)
    check_model_path(model)
    cut = resolved.pruning
    check_functions(resolved.finetune.loss, cut.criterion, cut.allocation, resolved.evaluation.tier)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, arch, trust_pickle)
    resolved = with_threat_of(loaded, resolved)

    with working("Loading the libraries"):
        from ..compression import compress as run_compression
        from ..compression import plan_only
        from ..job import Compression
        from ..machine.host import tune_allocator
        from ..runs.cache import Cache

    tune_allocator()
    store = Cache.named(cache).of_model(loaded.spec.arch)
    job = Compression(run_name(model), loaded, bundle, resolved, out, command_line(), store)
    if not dry_run:
        done = run_compression(job)
        if done is not None:
            after_compress(done.folder, resolved, arch or resolved.model.arch)
        return
    plan_only(job)
    if resolved.pruning.cuts > 1:
        warn(f"this is the first of {resolved.pruning.cuts} cuts; the others are planned on the model that it leaves.")
    console.print("Dry run: no run folder was written.")
