"""What several commands share: resolving the recipe, opening models and data, naming runs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import distributed, plain_yaml, recipe_reader
from ..catalogue import CATALOGUES
from ..console import console, warn, working
from ..errors import EnvironmentProblem, UsageError
from ..recipe import Recipe
from ..recipe_reader import load

if TYPE_CHECKING:
    from ..data.base import DataBundle
    from ..models.artifact import Model

DEMO = "demo"


def resolve(
    recipe: str | None,
    flags: Mapping[str, Any],
    assignments: Sequence[str] | None,
    *,
    demo: bool = False,
    trust_code: bool = False,
) -> Recipe:
    """The recipe with flags put over it; `demo` picks the demo's recipe when none is named.

    Raises:
        UsageError: see `recipe_reader.load`; or the recipe names code, and `trust_code` is false.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    given |= dict(_assignment(text) for text in assignments or ())
    found = load(recipe or (DEMO if demo else None), given)
    if not trust_code:
        recipe_reader.check_code(found, given.keys())
    return found


def _assignment(text: str) -> tuple[str, Any]:
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise UsageError(f"--set wants KEY=VALUE such as finetune.lr=0.05, got {text!r}")
    try:
        return key, plain_yaml.parse(value)
    except ValueError as error:
        raise UsageError(f"--set {text[:80]!r}: the value is not valid YAML: {error}") from error


def listed(text: str | None) -> list[str] | None:
    """The parts of a flag that takes several values, separated by commas; None for a flag that was not given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def check_functions(*names: str) -> None:
    """Raises `UsageError` early, before anything is computed, when a choice that is not of this package cannot load."""
    for name in names:
        holders = [catalogue for catalogue in CATALOGUES if name in catalogue.choices] or CATALOGUES[:1]
        if not any(catalogue.is_builtin(name) for catalogue in holders):
            holders[0].load(name)


def check_out_file(flag: str, path: Path | None) -> None:
    """Raise an error early, before anything is computed, when a file cannot be written; None is not checked.

    Raises:
        UsageError: it is a folder, a device or a pipe, or lies below a file.
        EnvironmentProblem: its folder is not writable.
    """
    if path is not None and path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise UsageError(f"{flag} {path} is {kind}. Name a file.")
    if path is not None:
        check_out_folder(flag, path.parent)


def check_out_folder(flag: str, path: Path | None) -> None:
    """Raise an error early, before anything is computed, when a folder cannot be made; None is not checked.

    Raises:
        UsageError: it is a file, or lies below a file.
        EnvironmentProblem: it is not writable.
    """
    if path is None:
        return
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        raise UsageError(f"{flag}: {nearest} is a file. Name a folder.")
    if not os.access(nearest, os.W_OK):
        raise EnvironmentProblem(f"{flag}: {nearest} is not writable. Choose another place.")


def check_model_path(model: str) -> None:
    """Raises `UsageError` early, before slow imports and data, when a model file is not there."""
    if model != DEMO and "/" not in model and not Path(model).exists():
        raise UsageError(
            f"model file {model} does not exist. Give a file, 'demo' for the embedded model, or a published model such "
            "as timm/NAME."
        )


@working("Opening the data")
def open_data(recipe: Recipe) -> DataBundle:
    """The recipe's data set.

    Raises:
        UsageError: none is named, or it cannot be read.
        EnvironmentProblem: it is not on this machine and cannot be downloaded.
    """
    from ..data.sources import load_data

    section = recipe.data
    if section.name is None:
        raise UsageError(
            "no data given. Add --data cifar10 (or cifar100, svhn, fashion_mnist, a folder, an .npz or .parquet file), "
            "or --data sample for the embedded sample of CIFAR-10."
        )
    root = Path(section.root).expanduser() if section.root else None
    distributed.join(recipe.device)
    with distributed.one_at_a_time_per_node():
        # Splits do not follow the recipe's seed: what one run tests on, no other may have trained on.
        data = load_data(
            section.name, validation=section.validation, root=root, image_size=section.image_size,
            crop_fraction=section.crop_fraction, class_order=section.class_order,
        )  # fmt: skip
    for note in data.notes:
        warn(note)
    return data


@working("Opening the model")
def open_model_for(
    model: str, data: DataBundle | None, recipe: Recipe, arch: str | None, trust_pickle: bool = False
) -> Model:
    """The model behind a name or path, held against the data it is to be used with."""
    from ..introspect.obstacles import check_scripted
    from ..models.foreign import open_model

    # A recipe's architecture is for files that hold only weights; the demo brings its own.
    known = arch if model == DEMO else arch or recipe.model.arch
    section = recipe.model
    loaded = open_model(
        model, arch=known, kwargs=section.kwargs, normalization=section.normalization, trust_pickle=trust_pickle,
        data=data,
    )  # fmt: skip
    check_scripted(loaded.module)
    for note in loaded.provenance.get("notes", ()):
        console.print(note, markup=False)
    return loaded


def with_threat_of(loaded: Model, recipe: Recipe) -> Recipe:
    """Return the recipe with what recipe and flags leave open of the threat model filled in from the model; say so."""
    found = recipe_reader.with_threat_of(recipe, loaded.threat, loaded.spec.input_size)
    if found.threat_model != recipe.threat_model:
        console.print(f"Threat model: {found.threat_model}, as stored with the model.", markup=False)
    return found


def run_name(model: str) -> str:
    """A short name for folders and titles: the file's stem, or its folder's name for a ``model.*`` in a run folder."""
    path = Path(model)
    stem = path.parent.name if path.stem == "model" and path.parent.name else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem) or "model"


def command_line() -> str:
    """The command that repeats this run, as the user typed it."""
    started = distributed.launch_command()
    return (
        f"{started} -m robust_prune {shlex.join(sys.argv[1:])}"
        if started
        else shlex.join(["robust-prune", *sys.argv[1:]])
    )
