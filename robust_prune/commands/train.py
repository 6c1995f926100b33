"""robust-prune train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..catalogue import LOSSES
from ..errors import UsageError
from ..recipe_reader import with_threat_of
from .common import (
    DataFlag,
    DeviceFlag,
    EpsilonFlag,
    ImagesFlag,
    NormalizationFlag,
    NormFlag,
    RecipeFlag,
    SeedFlag,
    SetFlag,
    check_functions,
    command_line,
    open_data,
    resolve,
)


# More than eight parameters: one for each flag.
def train(
    *,
    recipe: RecipeFlag = None,
    arch: Annotated[
        str | None, Parameter(help="Architecture: timm/NAME, torchvision/NAME, cifar/NAME or FILE.py:FUNCTION.")
    ] = None,
    normalization: NormalizationFlag = None,
    data: DataFlag = None,
    out: Annotated[Path | None, Parameter(help="Run folder; by default runs/ARCH-DATA.")] = None,
    epochs: Annotated[int | None, Parameter(help="Passes over the training images.")] = None,
    loss: Annotated[str | None, Parameter(help=f"Training method: {LOSSES.help()}.")] = None,
    epsilon: EpsilonFlag = None,
    norm: NormFlag = None,
    images: ImagesFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    assignments: SetFlag = None,
) -> None:
    """Train a robust model from scratch; the same command resumes a run that was killed."""
    flags = {
        "model.arch": arch,
        "model.normalization": normalization,
        "data.name": data,
        "training.epochs": epochs,
        "training.loss": loss,
        "threat.epsilon": epsilon,
        "threat.norm": norm,
        "evaluation.images": images,
        "seed": seed,
        "device": device,
    }
    resolved = with_threat_of(resolve(recipe, flags, assignments), None)
    if (chosen := resolved.model.arch) is None:
        raise UsageError("no architecture given. Add --arch, e.g. --arch cifar/resnet18.")
    check_functions(resolved.training.loss, resolved.evaluation.tier)
    bundle = open_data(resolved)
    resolved = with_threat_of(resolved, None, bundle.input_size)

    from ..machine.host import tune_allocator
    from ..train import train_model

    tune_allocator()
    name = f"{chosen.rpartition('/')[2].replace(':', '-')}-{bundle.name}"
    train_model(name, bundle, resolved, out or Path("runs") / name, command_line())
