"""robust-prune evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..console import console
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
    check_model_path,
    open_data,
    open_model_for,
    resolve,
    run_name,
)


def evaluate(
    model: str,
    *,
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    onnx: Annotated[Path | None, Parameter(help="The exported file of this model, scored on the same images.")] = None,
    steps: Annotated[int | None, Parameter(help="PGD steps.")] = None,
    restarts: Annotated[int | None, Parameter(help="Random restarts.")] = None,
    epsilon: Annotated[str | None, Parameter(help="Radius, e.g. 8/255.")] = None,
    images: ImagesFlag = None,
    out: Annotated[Path | None, Parameter(help="Result card, a .json file; its neighbour keeps the progress.")] = None,
    arch: ArchFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust_pickle: TrustFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Measure clean and robust accuracy of a model on test images.

    Parameters
    ----------
    model
        A model file, or "demo" for the embedded one.
    """
    flags = {
        "evaluation.steps": steps,
        "evaluation.restarts": restarts,
        "evaluation.images": images,
        "threat.epsilon": epsilon,
        "data.name": data,
        "seed": seed,
        "device": device,
    }
    resolved = resolve(recipe, flags, assignments, demo=model == DEMO)
    check_model_path(model)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, arch, trust_pickle)

    from .. import stages
    from ..job import warn
    from ..machine import tune_allocator
    from ..pipeline import SAMPLE_NOTE
    from ..run_dir import write_json

    tune_allocator()
    threat, where = stages.threat_of(resolved), stages.device_of(resolved)
    state = out.with_suffix(".state.npz") if out is not None else None
    found = stages.evaluate_model(
        loaded.model, bundle, threat, resolved.evaluation,
        name=run_name(model), seed=resolved.seed, device=where, onnx=onnx, state_path=state,
    )  # fmt: skip
    card = found.card
    console.print(f"{card.model} on {card.data} ({card.split}, {card.clean.total} images), {threat}", markup=False)
    console.print(f"clean            {card.clean}", markup=False)
    console.print(f"robust ({card.tier})     {card.robust}   {card.attack}", markup=False)
    if found.twin_clean and found.twin_robust:
        console.print(f"ONNX clean       {found.twin_clean}", markup=False)
        console.print(f"ONNX robust      {found.twin_robust}   at the same adversarial images", markup=False)
    for flag in card.flags:
        warn(flag)
    warn(SAMPLE_NOTE if bundle.sample else "")
    if out is not None and state is not None:
        write_json(out, card.to_json())
        state.unlink(missing_ok=True)
