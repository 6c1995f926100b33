"""robust-prune verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ..console import console, working
from ..errors import QualityGateError, UsageError
from .common import open_data
from .flags import MODEL_AND_DATA, RUN, ArchFlag, DataFlag

MOST_APART = 0.01
"""Share of the images on which two machines may classify differently, by rounding."""
BATCH = 100


def verify(
    run: Annotated[Path, Parameter(group=RUN, help="Run folder of compress or train.")],
    /,
    *,
    data: DataFlag = None,
    images: Annotated[int, Parameter(group=MODEL_AND_DATA, help="Number of test images to classify again.")] = 200,
    arch: ArchFlag = None,
) -> None:
    """Check that the files of a run are those that it wrote, and classify a sample of images again."""
    from ..runs.audit import points

    inside = points(run)
    for folder in (run, *inside):
        _verify(folder, data, images, arch, has_model=folder != run or not inside)


def _verify(run: Path, data: str | None, images: int, arch: str | None, has_model: bool) -> None:
    """Check one run folder; that of a frontier or a goal has no model itself.

    Raises:
        UsageError, QualityGateError: as `_classify_again`, or a file is not what the run wrote.
    """
    from ..runs.audit import damaged

    if not has_model:
        console.print(f"{run}: several runs", markup=False)
    problems, count = damaged(run)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise QualityGateError(f"{problems[0]}{more}.")
    console.print(f"{count} records and files of the stages are as they were written.", markup=False)
    if has_model:
        _classify_again(run, data, images, arch)


def _classify_again(run: Path, data: str | None, count: int, arch: str | None) -> None:
    """Compare what the models of a finished run say to a sample of the test images with what the run recorded.

    Raises:
        UsageError: the run is not finished, or `count` is below 1.
        QualityGateError: a model or an ONNX file classifies otherwise than the run recorded.
    """
    import torch

    from .. import recipe_reader
    from ..data.base import Subset, batches, labels_of, stratified, stratified_order
    from ..evaluation.onnx_scores import OnnxModel
    from ..models import artifact
    from ..models.foreign import check_data
    from ..report.compare import load_run

    if count < 1:
        raise UsageError(f"--images must be at least 1, got {count}")
    report = load_run(run)
    recipe = recipe_reader.load(str(run / "recipe.yaml"), {"data.name": data})
    bundle = open_data(recipe)
    model = artifact.load(run / "model.safetensors", arch=arch)
    check_data(model.spec, num_classes=bundle.num_classes, input_size=bundle.input_size)
    images = stratified(bundle.test, recipe.evaluation.images)
    order = stratified_order(labels_of(images))[:count]
    stored = _stored_verdicts(run, len(images))
    chosen = Subset(images, order)
    labels = labels_of(chosen)
    with working("Classifying images again"), torch.no_grad():
        right = {"model.safetensors": torch.cat([model(x).argmax(dim=1) == y for x, y in batches(chosen, BATCH)])}
        if (file := run / "model.onnx").is_file() and file.name in stored:
            exported = OnnxModel(file)
            right["model.onnx"] = torch.cat([exported.predict(x) == y for x, y in batches(chosen, BATCH)])
    for name, found in right.items():
        apart = int((found != torch.from_numpy(stored[name])[order]).sum())
        if apart > MOST_APART * len(labels):
            raise QualityGateError(
                f"{run / name} classifies {apart} of {len(labels)} test images otherwise than the run says."
            )
        console.print(
            f"{name}: {len(labels) - apart} of {len(labels)} images as in the run's evaluation.", markup=False
        )
    console.print(
        f"Its table: {report.title}, {report.created}. A forged table cannot be told from a true one.", markup=False
    )


def _stored_verdicts(run: Path, count: int) -> dict[str, Any]:
    """Return which images the run classified correctly without an attack, bool [N], by the name of the file."""
    from ..evaluation.state import read_state

    place = next((f for f in (run / "evaluate-pruned", run / "evaluate") if (f / "state.npz").is_file()), None)
    if place is None:
        raise UsageError(f"{run} holds no evaluation. Give the folder of a finished run.")
    try:
        _, state = read_state(place / "state.npz")
    except UsageError as error:
        raise QualityGateError(f"{error}.") from error
    found = {"model.safetensors": state["clean"]}
    found |= {"model.onnx": state["exported_clean"][0]} if len(state["exported_clean"]) else {}
    if len(found["model.safetensors"]) != count:
        raise UsageError(
            f"the run was evaluated on {len(found['model.safetensors'])} images, and the data have {count}. Give the "
            "data of the run with --data."
        )
    return found
