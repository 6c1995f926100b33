"""robust-prune compress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..catalogue import ALLOCATIONS, CRITERIA, LOSSES
from ..console import console, warn, working
from ..errors import UsageError
from ..recipe import RECOVERIES, Recipe, Recovery
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
from .targets import target_of, with_target

if TYPE_CHECKING:
    from ..goal import Goal


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompressFlags:
    """Flags of the commands that compress a model."""

    data: DataFlag = None
    recipe: RecipeFlag = None
    out: Annotated[
        Path | None, Parameter(group=RUN, help="Run folder.", show_default=stated("a new one below runs/"))
    ] = None
    arch: ArchFlag = None
    normalization: NormalizationFlag = None
    metric: Annotated[
        str | None,
        of_recipe(
            PRUNING,
            "pruning.metric",
            "What the ratio counts: macs (multiply-accumulates), params, channels, or latency (of the exported file on "
            "this machine).",
        ),
    ] = None
    allocation: Annotated[
        str | None,
        of_recipe(PRUNING, "pruning.allocation", f"How the cut is spread over the groups: {ALLOCATIONS.help()}."),
    ] = None
    criterion: Annotated[
        str | None,
        of_recipe(PRUNING, "pruning.criterion", f"Score of the channels within a group: {CRITERIA.help()}."),
    ] = None
    keep: Annotated[
        list[str] | None,
        Parameter(
            group=PRUNING,
            negative="",
            help="Layer that keeps all channels, by name or pattern, e.g. layer4 or 'layer?.*.conv1'; repeatable.",
        ),
    ] = None
    limit: Annotated[
        list[str] | None,
        Parameter(
            group=PRUNING,
            negative="",
            help="Largest share of its channels that a layer may lose, e.g. layer4=0.8; repeatable.",
        ),
    ] = None
    target_macs: Annotated[
        str | None, Parameter(group=PRUNING, help="Number of MACs to leave, e.g. 50M, in place of a ratio.")
    ] = None
    target_params: Annotated[
        str | None, Parameter(group=PRUNING, help="Number of parameters to leave, e.g. 300k, in place of a ratio.")
    ] = None
    target_latency: Annotated[
        str | None,
        Parameter(
            group=PRUNING,
            help="Latency to reach on this machine, e.g. 5ms, in place of a ratio; at the first batch size and number "
            "of threads of the recipe's bench section.",
        ),
    ] = None
    min_robust: Annotated[
        float | None,
        Parameter(
            group=PRUNING,
            help="Find the largest ratio that keeps this robust accuracy, in percent, in place of a ratio.",
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        Parameter(
            group=PRUNING,
            help="Find the largest ratio that loses at most so many points of robust accuracy, in place of a ratio.",
        ),
    ] = None
    cuts: Annotated[
        int | None,
        of_recipe(PRUNING, "pruning.cuts", "Number of rounds of pruning and fine-tuning that share the ratio."),
    ] = None
    epsilon: EpsilonFlag = None
    norm: NormFlag = None
    recovery: Annotated[
        Recovery | None,
        Parameter(
            group=RECOVERY,
            help="Preset for method and length of fine-tuning.",
            show_default=stated("what the recipe says"),
        ),
    ] = None
    epochs: Annotated[
        int | None, of_recipe(RECOVERY, "finetune.epochs", "Passes over the training images in fine-tuning.")
    ] = None
    loss: Annotated[str | None, of_recipe(RECOVERY, "finetune.loss", f"Fine-tuning method: {LOSSES.help()}.")] = None
    baseline: Annotated[
        str | None,
        of_recipe(
            RECOVERY,
            "baseline.kind",
            "With scratch, also train the pruned architecture from fresh weights for as long as fine-tuning took "
            "(or --set baseline.minutes=10), and add it to the table.",
        ),
    ] = None
    tier: TierFlag = None
    images: ImagesFlag = None
    precision: PrecisionFlag = None
    seed: SeedFlag = None
    device: DeviceFlag = None
    cache: CacheFlag = None
    trust_pickle: TrustFlag = False
    trust_code: TrustCodeFlag = False
    assignments: SetFlag = None

    def resolved(self, model: str, ratio: str | None) -> Recipe:
        """Return the recipe with these flags put over it.

        Raises:
            UsageError: as `resolve`.
        """
        given = self._values() | ({} if ratio is None else {"pruning.ratio": ratio})
        return resolve(self.recipe, given, self.assignments, demo=model == DEMO, trust_code=self.trust_code)

    def goal(self) -> Goal | None:
        """Return the goal that the flags state.

        Raises:
            UsageError: it is out of range, or there are two.
        """
        if self.min_robust is None and self.max_drop is None:
            return None
        from ..goal import goal_of

        return goal_of(self.min_robust, self.max_drop)

    def _values(self) -> dict[str, Any]:
        """Return the values of the recipe that were given, by their keys."""
        flags = {
            "pruning.metric": self.metric,
            "pruning.allocation": self.allocation,
            "pruning.criterion": self.criterion,
            "pruning.keep": self.keep,
            "pruning.limits": _limits(self.limit) if self.limit else None,
            "pruning.cuts": self.cuts,
            "threat.epsilon": self.epsilon,
            "threat.norm": self.norm,
            "data.name": self.data,
            "model.normalization": self.normalization,
            "finetune.epochs": self.epochs,
            "finetune.loss": self.loss,
            "baseline.kind": self.baseline,
            "evaluation.images": self.images,
            "evaluation.tier": self.tier,
            "export.precisions": listed(self.precision),
            "seed": self.seed,
            "device": self.device,
        }
        preset = {f"finetune.{key}": value for key, value in RECOVERIES[self.recovery].items()} if self.recovery else {}
        return preset | {key: value for key, value in flags.items() if value is not None}


def _limits(texts: Sequence[str]) -> dict[str, str]:
    """Return the limits by pattern.

    Raises:
        UsageError: a text is not LAYER=SHARE, or a pattern has two limits.
    """
    found: dict[str, str] = {}
    for text in texts:
        pattern, mark, share = text.rpartition("=")
        if not mark or not pattern:
            raise UsageError(f"--limit wants LAYER=SHARE such as layer4=0.8, got {text[:80]!r}")
        if pattern in found:
            raise UsageError(f"--limit {pattern} was given twice: {found[pattern]} and {share}. Give one of them.")
        found[pattern] = share
    return found


DryRunFlag = Annotated[
    bool, Parameter(group=RUN, negative="", help="Print the plan, and write no run folder.", show_default=False)
]
_RATIOS = "Shares to remove, each between 0 and 1: a model for each."


def compress(
    model: ModelArgument,
    /,
    *,
    ratio: Annotated[
        str | None,
        of_recipe(
            PRUNING,
            "pruning.ratio",
            "Share to remove, between 0 and 1: 0.5 removes half. Several, such as 0.5,0.75, are a frontier.",
        ),
    ] = None,
    dry_run: DryRunFlag = False,
    flags: CompressFlags | None = None,
) -> None:
    """Prune a robust model, fine-tune it, and report its robust accuracy and latency."""
    ratios: list[str | None] = list(listed(ratio) or ()) or [None]
    _run(model, ratios, dry_run, flags or CompressFlags(), several=len(ratios) > 1)


def frontier(
    model: ModelArgument,
    /,
    *,
    ratio: Annotated[str, Parameter(group=PRUNING, help=_RATIOS)] = "0.3,0.5,0.75,0.9",
    dry_run: DryRunFlag = False,
    flags: CompressFlags | None = None,
) -> None:
    """Compress a robust model by several ratios, and report all models in one table and one plot."""
    _run(model, listed(ratio) or [None], dry_run, flags or CompressFlags(), several=True)


def _check_budgets(flags: CompressFlags, ratios: Sequence[str | None], dry_run: bool, several: bool) -> None:
    """Raise UsageError if flags state more than one budget, or one that the command cannot have."""
    budgets = {
        "--target-macs": flags.target_macs, "--target-params": flags.target_params,
        "--target-latency": flags.target_latency, "--min-robust": flags.min_robust, "--max-drop": flags.max_drop,
    }  # fmt: skip
    given = [flag for flag, value in budgets.items() if value is not None]
    if several and given:
        raise UsageError(f"a frontier has several ratios, and {given[0]} is one budget. Give it to compress.")
    given = [*(["--ratio"] if ratios[0] is not None else []), *given]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are two budgets. Give one of them.")
    if given and given[0].startswith("--target") and flags.metric is not None:
        raise UsageError(f"{given[0]} says what is counted, and --metric {flags.metric} too. Give one of them.")
    if dry_run and given and given[0] in ("--min-robust", "--max-drop"):
        raise UsageError(f"{given[0]} has no plan before models are trained. Leave out --dry-run.")


def _run(model: str, ratios: Sequence[str | None], dry_run: bool, flags: CompressFlags, several: bool = False) -> None:
    """Compress a model by one ratio (None for that of the recipe), or by several as a frontier."""
    target = target_of(flags.target_macs, flags.target_params, flags.target_latency)
    goal = flags.goal()
    _check_budgets(flags, ratios, dry_run, several)
    recipes = [flags.resolved(model, ratio) for ratio in ratios]
    resolved = recipes[0]
    check_model_path(model)
    cut = resolved.pruning
    check_functions(resolved.finetune.loss, cut.criterion, cut.allocation, resolved.evaluation.tier)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, flags.arch, flags.trust_pickle)
    resolved = with_threat_of(loaded, resolved)

    with working("Loading the libraries"):
        from ..compression import compress as run_compression
        from ..compression import plan_only
        from ..goal import reach
        from ..job import Compression
        from ..machine.host import tune_allocator
        from ..ratios import frontier as run_frontier
        from ..runs.cache import Cache

    tune_allocator()
    store = Cache.named(flags.cache).of_model(loaded.spec.arch)
    resolved = with_target(resolved, target, loaded, bundle, store)
    job = Compression(run_name(model), loaded, bundle, resolved, flags.out, command_line(), store)
    shares = [resolved.pruning.ratio, *(recipe.pruning.ratio for recipe in recipes[1:])]
    if dry_run:
        for share in shares:
            plan_only(job.at(share))
        if cut.cuts > 1:
            warn(f"this is the first of {cut.cuts} cuts; the others are planned on the model that it leaves.")
        console.print("Dry run: no run folder was written.")
        return
    if several:
        run_frontier(job, shares)
        return
    done = run_compression(job) if goal is None else reach(job, goal)
    if done is not None:
        after_compress(done.folder, resolved, flags.arch or resolved.model.arch)
