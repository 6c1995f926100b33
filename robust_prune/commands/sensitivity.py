"""robust-prune sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..console import console, warn, working
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

    from ..machine.device import choose_device
    from ..preflight import preflight
    from ..runs.files import write_json
    from ..sensitivity.adversarial_set import make_adversarial_set
    from ..sensitivity.display import render_table
    from ..sensitivity.estimators import measure
    from ..serialization import to_json
    from ..structure.groups import find_groups
    from ..structure.paths import sample_images

    threat, section, where = resolved.threat_model, resolved.sensitivity, choose_device(resolved.device)
    for note in preflight(loaded.module, bundle.train, bundle.num_classes, resolved.seed).notes:
        warn(note)
    seen = sample_images(bundle.train, resolved.seed)
    with working("Finding groups of channels and proving each by a trial cut"):
        search = find_groups(loaded.module, loaded.spec.blank_image(), seen)
    loaded.module.to(where)
    adv = make_adversarial_set(loaded.module, bundle.train, threat, section, seed=resolved.seed, device=where)
    profile = measure(loaded.module, adv, section, groups=search.groups, device=where)
    console.print(render_table(profile))
    if out is not None:
        write_json(out / "sensitivity.json", to_json(profile))
        console.print(str(out / "sensitivity.json"), markup=False)
