"""robust-prune evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..console import alarm, console, warn
from .common import (
    DEMO,
    check_functions,
    check_model_path,
    check_out_file,
    listed,
    open_data,
    open_model_for,
    resolve,
    run_name,
    with_threat_of,
)
from .flags import (
    EVALUATION,
    MODEL_AND_DATA,
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
    RecipeFlag,
    SeedFlag,
    SetFlag,
    TierFlag,
    TrustCodeFlag,
    TrustFlag,
    of_recipe,
)

if TYPE_CHECKING:
    from ..evaluation.card import ResultCard

FEWEST_OF_A_CLASS = 20


# More than eight parameters: one for each flag.
def evaluate(
    model: ModelArgument,
    /,
    *,
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    onnx: Annotated[
        Path | None,
        Parameter(group=MODEL_AND_DATA, help="The ONNX file of this model, to be evaluated on the same images."),
    ] = None,
    tier: TierFlag = None,
    steps: Annotated[int | None, of_recipe(EVALUATION, "evaluation.steps", "Steps of PGD.")] = None,
    restarts: Annotated[int | None, of_recipe(EVALUATION, "evaluation.restarts", "Random restarts of PGD.")] = None,
    epsilon: EpsilonFlag = None,
    norm: NormFlag = None,
    sweep: Annotated[
        str | None,
        of_recipe(
            EVALUATION,
            "evaluation.sweep",
            "Further radii, evaluated with PGD, in the same units as --epsilon, e.g. 2/255,4/255,16/255.",
        ),
    ] = None,
    images: ImagesFlag = None,
    out: Annotated[
        Path | None, Parameter(group=RUN, help="Result as a .json file; a file beside it keeps the progress.")
    ] = None,
    arch: ArchFlag = None,
    normalization: NormalizationFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    cache: CacheFlag = None,
    trust_pickle: TrustFlag = False,
    trust_code: TrustCodeFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Measure clean and robust accuracy of a model on test images."""
    flags = {
        "evaluation.tier": tier,
        "evaluation.sweep": listed(sweep),
        "evaluation.steps": steps,
        "evaluation.restarts": restarts,
        "evaluation.images": images,
        "threat.epsilon": epsilon,
        "threat.norm": norm,
        "data.name": data,
        "model.normalization": normalization,
        "seed": seed,
        "device": device,
    }
    resolved = resolve(recipe, flags, assignments, demo=model == DEMO, trust_code=trust_code)
    check_model_path(model)
    check_functions(resolved.evaluation.tier)
    check_out_file("--out", out)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, arch, trust_pickle)
    resolved = with_threat_of(loaded, resolved)

    from ..data.base import SAMPLE_NOTE
    from ..evaluation.kept import Terms, evaluate_once
    from ..evaluation.onnx_scores import OnnxModel
    from ..machine.host import tune_allocator
    from ..machine.snapshot import snapshot
    from ..runs.cache import Cache
    from ..runs.files import write_json
    from ..serialization import to_json

    tune_allocator()
    threat = resolved.threat_model
    state = out.with_suffix(".state.npz") if out is not None else None
    exported = {"exported": OnnxModel(onnx)} if onnx else {}
    terms = Terms(bundle, resolved, Cache.named(cache))
    card = evaluate_once(loaded, run_name(model), terms, exported=exported, state_path=state)
    console.print(f"{card.model} on {card.data} ({card.split}, {card.clean.total} images), {threat}", markup=False)
    console.print(f"clean            {card.clean}", markup=False)
    console.print(f"robust ({card.tier})     {card.robust}   {card.attack}", markup=False)
    how = "asked at the points of the attack on the model"
    for file in card.exported.values():
        console.print(f"ONNX clean       {file.clean}", markup=False)
        console.print(f"ONNX robust      {file.robust}   {how}", markup=False)
    for line in _details(card, bundle.class_names):
        console.print(line, markup=False)
    for flag in card.flags:
        alarm(flag)
    warn(SAMPLE_NOTE if bundle.sample else "")
    if card.tier == "pgd" and threat.epsilon:
        console.print("PGD gives an upper bound; the same command with --tier aa-fast gives AutoAttack's result.")
    if out is not None and state is not None:
        write_json(out, {**to_json(card), "environment": snapshot()})
        state.unlink(missing_ok=True)


def _details(card: ResultCard, class_names: Sequence[str]) -> Iterator[str]:
    """What the headline does not say: each attack's part, other radii, and the classes that fare best and worst."""
    from ..attacks import ThreatModel

    total = card.robust.total
    if len(card.breakdown) > 1:
        yield "standing after   " + ", ".join(f"{name} {left / total:.2%}" for name, left in card.breakdown.items())
    if card.sweep:
        radii = (f"{ThreatModel(card.threat.norm, radius)} {found}" for radius, found in card.sweep)
        yield "other radii      " + "; ".join(radii) + "   by PGD"
    if len(card.per_class) > 1 and min(part.total for part in card.per_class) >= FEWEST_OF_A_CLASS:
        ranked = sorted(card.per_class, key=lambda part: part.robust / part.total)
        worst, best = (
            f"{class_names[part.label]} {part.robust / part.total:.1%} of {part.total}"
            for part in (ranked[0], ranked[-1])
        )
        yield f"robust by class  from {worst} to {best}"
