"""robust-prune sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..console import console, warn
from .common import (
    DEMO,
    check_model_path,
    check_out_folder,
    open_data,
    open_model_for,
    resolve,
    with_threat_of,
)
from .flags import (
    RUN,
    SENSITIVITY,
    ArchFlag,
    CacheFlag,
    DataFlag,
    DeviceFlag,
    EpsilonFlag,
    ModelArgument,
    NormalizationFlag,
    NormFlag,
    RecipeFlag,
    SeedFlag,
    SetFlag,
    TrustCodeFlag,
    TrustFlag,
    of_recipe,
)


# More than eight parameters: one for each flag.
def sensitivity(
    model: ModelArgument,
    /,
    *,
    estimator: Annotated[
        str | None,
        of_recipe(SENSITIVITY, "sensitivity.estimator", "How MRS is estimated: gradient, boundary or ascent."),
    ] = None,
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    out: Annotated[Path | None, Parameter(group=RUN, help="Folder that receives sensitivity.json.")] = None,
    arch: ArchFlag = None,
    normalization: NormalizationFlag = None,
    epsilon: EpsilonFlag = None,
    norm: NormFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    cache: CacheFlag = None,
    trust_pickle: TrustFlag = False,
    trust_code: TrustCodeFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Measure the Module Robustness Sensitivity (MRS) of each layer."""
    flags = {
        "sensitivity.estimator": estimator, "threat.epsilon": epsilon, "threat.norm": norm, "data.name": data,
        "model.normalization": normalization, "seed": seed, "device": device,
    }  # fmt: skip
    resolved = resolve(recipe, flags, assignments, demo=model == DEMO, trust_code=trust_code)
    check_model_path(model)
    check_out_folder("--out", out)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, arch, trust_pickle)
    resolved = with_threat_of(loaded, resolved)

    from ..budget.measured import Measured
    from ..machine.device import choose_device
    from ..preflight import preflight
    from ..runs.cache import Cache
    from ..runs.files import write_json
    from ..sensitivity.display import render_table
    from ..serialization import to_json

    where, store = choose_device(resolved.device), Cache.named(cache).of_model(loaded.spec.arch)
    for note in preflight(loaded.module, bundle.train, bundle.num_classes, resolved.seed).notes:
        warn(note)
    known = Measured(loaded.module, loaded.spec, bundle.train, resolved, where, store)
    profile = known.profile(known.groups().groups)
    console.print(render_table(profile))
    if out is not None:
        write_json(out / "sensitivity.json", to_json(profile))
        console.print(str(out / "sensitivity.json"), markup=False)
