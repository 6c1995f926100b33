"""robust-prune export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..console import console, working
from .common import (
    DEMO,
    check_model_path,
    check_out_file,
    listed,
    open_data,
    open_model_for,
    resolve,
)
from .flags import (
    EXPORT,
    ArchFlag,
    DataFlag,
    ModelArgument,
    NormalizationFlag,
    PrecisionFlag,
    RecipeFlag,
    SetFlag,
    TrustCodeFlag,
    TrustFlag,
    of_recipe,
)
from .next_steps import say_next

if TYPE_CHECKING:
    from ..exporters.types import OnnxArtifact


# More than eight parameters: one for each flag.
def export(
    model: ModelArgument,
    /,
    *,
    out: Annotated[Path, Parameter(group=EXPORT, help="The .onnx file to write.")] = Path("model.onnx"),
    data: DataFlag = None,
    recipe: RecipeFlag = None,
    opset: Annotated[
        int | None, of_recipe(EXPORT, "export.opset", "Version of the ONNX operator set, 18 or newer.")
    ] = None,
    precision: PrecisionFlag = None,
    arch: ArchFlag = None,
    normalization: NormalizationFlag = None,
    trust_pickle: TrustFlag = False,
    trust_code: TrustCodeFlag = False,
    assignments: SetFlag = None,
) -> None:
    """Write a model as one ONNX file, checked against a float64 reference on real images."""
    flags = {
        "export.opset": opset, "export.precisions": listed(precision), "data.name": data,
        "model.normalization": normalization,
    }  # fmt: skip
    resolved = resolve(recipe, flags, assignments, demo=model == DEMO, trust_code=trust_code)
    check_model_path(model)
    check_out_file("--out", out)
    bundle = open_data(resolved)
    loaded = open_model_for(model, bundle, resolved, arch, trust_pickle)

    from ..exporters.onnx import export_model
    from ..exporters.precision import export_precisions

    with working(f"Exporting {out.name} and checking it against float64"):
        files = [export_model(loaded.module, loaded.spec, bundle.train, out, resolved.export, resolved.seed)]
        _say(files[0])
    if resolved.export.precisions:
        with working(f"Exporting it in {' and '.join(resolved.export.precisions)}"):
            files += export_precisions(loaded.module, bundle.train, out, resolved.export).values()
    for reduced in files[1:]:
        _say(reduced)
    say_next(["bench", *(file.path for file in files)])


def _say(found: OnnxArtifact) -> None:
    parity = found.parity
    console.print(
        f"{found.path}: {found.precision}, {found.bytes / 1e6:.2f} MB, opset {found.opset}; largest logit error "
        f"{parity.onnx_error:.2g} (torch fp32: {parity.torch_error:.2g}) against float64 on {parity.images} images, "
        f"classes agree on {100 * parity.argmax_agreement:.0f} %",
        markup=False,
    )
