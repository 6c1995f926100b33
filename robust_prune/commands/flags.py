"""Flags that several commands share, their groups, and the defaults that help shows for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Group, Parameter

from .. import recipe_docs
from ..catalogue import TIERS

MODEL_AND_DATA = Group("Model and data", sort_key=1)
THREAT = Group("Threat model", sort_key=2)
PRUNING = Group("Pruning", sort_key=3)
SENSITIVITY = Group("Sensitivity", sort_key=3)
TRAINING = Group("Training", sort_key=4)
RECOVERY = Group("Recovery", sort_key=4)
EVALUATION = Group("Evaluation", sort_key=5)
EXPORT = Group("Export", sort_key=6)
MEASUREMENT = Group("Measurement", sort_key=6)
RUN = Group("Run", sort_key=7)


def stated(text: str) -> Callable[[Any], str]:
    """Make help show `text` as the default of a flag that has none itself, since something else fills it in."""
    return lambda _: text


def of_recipe(group: Group, key: str, text: str, missing: str = "none") -> Parameter:
    """Return the flag of a recipe key; help shows the recipe's default, and `missing` in place of null."""
    return Parameter(group=group, help=text, show_default=lambda _: recipe_docs.default(key, missing))


RECIPE_TEXT = "Settings of the run: a YAML file, or a name from `robust-prune recipes ls`. Flags count more."
RADIUS_TEXT = "Radius of the perturbation, in units of the [0, 1] pixel range, e.g. 8/255 for linf, 0.5 for l2."
NORM_TEXT = "Norm of the perturbation: linf or l2."

ModelArgument = Annotated[
    str,
    Parameter(
        group=MODEL_AND_DATA,
        help="A model file, a published model such as timm/NAME, or demo for the robust model that comes with the "
        "package.",
    ),
]
RecipeFlag = Annotated[
    str | None,
    Parameter(
        group=RUN,
        help=RECIPE_TEXT,
        show_default=stated("demo for the demo; else the defaults shown here"),
    ),
]
DataFlag = Annotated[
    str | None,
    Parameter(
        group=MODEL_AND_DATA,
        help="cifar10, cifar100, svhn, fashion_mnist, sample (embedded), a folder of class folders, an .npz file, or "
        "Hugging Face parquet files, or WebDataset shards (.tar).",
        show_default=stated("what the recipe names; sample for the demo"),
    ),
]
ArchFlag = Annotated[
    str | None,
    Parameter(
        group=MODEL_AND_DATA,
        help="Architecture of a file that holds only weights: timm/NAME, torchvision/NAME, cifar/NAME, "
        "robustbench/DATA/THREAT/ID or FILE.py:FUNCTION.",
    ),
]
NormalizationFlag = Annotated[
    str | None,
    of_recipe(
        MODEL_AND_DATA,
        "model.normalization",
        "Normalization that the weights were trained with: auto (known or measured), none, data, imagenet, or MEAN/STD "
        "such as 0.5/0.5.",
    ),
]
SeedFlag = Annotated[int | None, of_recipe(RUN, "seed", "Seed of all random numbers.")]
DeviceFlag = Annotated[str | None, of_recipe(RUN, "device", "Where to compute: auto, cpu or cuda.")]
SetFlag = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative="",
        group=RUN,
        help="Set any value of the recipe, e.g. --set finetune.lr=0.05; repeatable. `robust-prune recipes explain` "
        "lists all keys.",
    ),
]
EpsilonFlag = Annotated[
    str | None,
    Parameter(
        group=THREAT,
        help=RADIUS_TEXT,
        show_default=lambda _: f"the model's, or {recipe_docs.default('threat.epsilon')}",
    ),
]
NormFlag = Annotated[
    str | None,
    Parameter(
        group=THREAT,
        help=NORM_TEXT,
        show_default=lambda _: f"the model's, or {recipe_docs.default('threat.norm')}",
    ),
]
ImagesFlag = Annotated[
    int | None,
    of_recipe(
        EVALUATION,
        "evaluation.images",
        "Evaluate on N test images, drawn with the class shares of the test set; always the same for one N, and part "
        "of a larger N.",
        "all",
    ),
]
TierFlag = Annotated[str | None, of_recipe(EVALUATION, "evaluation.tier", f"Strength of the attacks: {TIERS.help()}.")]
PrecisionFlag = Annotated[
    str | None,
    of_recipe(EXPORT, "export.precisions", "Further ONNX files beside the fp32 one: fp16, int8, or fp16,int8."),
]
CacheFlag = Annotated[
    str | None,
    Parameter(
        group=RUN,
        help="Folder of results that depend on the model and the data alone, which commands share; none switches this "
        "off.",
        show_default=stated("$ROBUST_PRUNE_CACHE, or ~/.cache/robust-prune"),
    ),
]
TrustCodeFlag = Annotated[
    bool,
    Parameter(
        negative="",
        group=RUN,
        help="Run the code that a recipe file names (FILE.py:FUNCTION). Only for recipes of your own.",
        show_default=False,
    ),
]
TrustFlag = Annotated[
    bool,
    Parameter(
        negative="",
        group=MODEL_AND_DATA,
        help="Open pickled modules, which run code from the file. Only for files of your own.",
        show_default=False,
    ),
]
