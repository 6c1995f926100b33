"""robust-prune train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..catalogue import LOSSES
from ..console import working
from ..errors import UsageError
from ..recipe_reader import with_threat_of
from .common import (
    check_functions,
    command_line,
    open_data,
    resolve,
)
from .flags import (
    MODEL_AND_DATA,
    NORM_TEXT,
    RADIUS_TEXT,
    RECIPE_TEXT,
    RUN,
    THREAT,
    TRAINING,
    DataFlag,
    DeviceFlag,
    ImagesFlag,
    SeedFlag,
    SetFlag,
    TrustCodeFlag,
    of_recipe,
    stated,
)
from .next_steps import after_train


# More than eight parameters: one for each flag.
def train(
    *,
    recipe: Annotated[
        str | None, Parameter(group=RUN, help=RECIPE_TEXT, show_default=stated("the defaults shown here"))
    ] = None,
    arch: Annotated[
        str | None,
        Parameter(
            group=MODEL_AND_DATA,
            help="Architecture: timm/NAME, torchvision/NAME, cifar/NAME or FILE.py:FUNCTION.",
            show_default=stated("what the recipe names"),
        ),
    ] = None,
    normalization: Annotated[
        str | None,
        Parameter(
            group=MODEL_AND_DATA,
            help="Normalization put before the network: none, data, imagenet, or MEAN/STD such as 0.5/0.5.",
            show_default=stated("data; none where the network normalizes itself"),
        ),
    ] = None,
    data: DataFlag = None,
    out: Annotated[Path | None, Parameter(group=RUN, help="Run folder.", show_default=stated("runs/ARCH-DATA"))] = None,
    epochs: Annotated[int | None, of_recipe(TRAINING, "training.epochs", "Passes over the training images.")] = None,
    loss: Annotated[str | None, of_recipe(TRAINING, "training.loss", f"Training method: {LOSSES.help()}.")] = None,
    epsilon: Annotated[str | None, of_recipe(THREAT, "threat.epsilon", RADIUS_TEXT)] = None,
    norm: Annotated[str | None, of_recipe(THREAT, "threat.norm", NORM_TEXT)] = None,
    images: ImagesFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust_code: TrustCodeFlag = False,
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
    resolved = with_threat_of(resolve(recipe, flags, assignments, trust_code=trust_code), None)
    if (chosen := resolved.model.arch) is None:
        raise UsageError("no architecture given. Add --arch, e.g. --arch cifar/resnet18.")
    check_functions(resolved.training.loss, resolved.evaluation.tier)
    bundle = open_data(resolved)
    resolved = with_threat_of(resolved, None, bundle.input_size)

    with working("Loading the libraries"):
        from ..machine.host import tune_allocator
        from ..train import train_model

    tune_allocator()
    name = f"{chosen.rpartition('/')[2].replace(':', '-')}-{bundle.name}"
    folder = out or Path("runs") / name
    if train_model(name, bundle, resolved, folder, command_line()) is not None:
        after_train(folder, resolved)
