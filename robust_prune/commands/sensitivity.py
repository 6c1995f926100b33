"""robust-prune sensitivity."""

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
    RecipeFlag,
    SeedFlag,
    SetFlag,
    TrustFlag,
    check_model_path,
    open_data,
    open_model_for,
    resolve,
)


def sensitivity(
    model: str,
    *,
    estimator: Annotated[str | None, Parameter(help="gradient, boundary or ascent.")] = None,
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    out: Annotated[Path | None, Parameter(help="Folder for sensitivity.json and sensitivity.png.")] = None,
    arch: ArchFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust_pickle: TrustFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Measure Module Robustness Sensitivity, layer by layer.

    Parameters
    ----------
    model
        A model file, or "demo" for the embedded one.
    """
    flags = {"sensitivity.estimator": estimator, "data.name": data, "seed": seed, "device": device}
    resolved = resolve(recipe, flags, assignments, demo=model == DEMO)
    check_model_path(model)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, arch, trust_pickle)

    from .. import stages
    from ..runs.files import write_json
    from ..sensitivity.display import draw_profile, render_table
    from ..structure.groups import find_groups

    threat, where = stages.threat_of(resolved), stages.device_of(resolved)
    search = find_groups(loaded.model, stages.blank_image(loaded.spec))
    loaded.model.to(where)
    adv = stages.adversarial_set(loaded.model, bundle.train, threat, resolved.sensitivity, resolved.seed, where)
    profile = stages.measure_sensitivity(loaded.model, adv, threat, resolved.sensitivity, search, where)
    console.print(render_table(profile))
    if out is not None:
        write_json(out / "sensitivity.json", profile.to_json())
        draw_profile(profile, out / "sensitivity.png")
        console.print(f"{out / 'sensitivity.json'}  {out / 'sensitivity.png'}", markup=False)
