"""Models of RobustBench's zoo (Croce et al., 2021, arXiv 2010.09670), built and loaded by its own package."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..attacks.threat import ThreatModel
from ..data.sources import data_root
from ..errors import EnvironmentProblem, UsageError
from ..printable import one_line
from ..suggest import did_you_mean

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""Number of classes of each data set of the zoo."""

_RADII = {
    ("cifar10", "Linf"): 8 / 255, ("cifar100", "Linf"): 8 / 255, ("imagenet", "Linf"): 4 / 255,
    ("cifar10", "L2"): 0.5, ("cifar100", "L2"): 0.5, ("imagenet", "L2"): 3.0,
}  # fmt: skip
_SETTINGS = ("Linf", "L2", "corruptions")
_FORM = "robustbench/cifar10/Linf/Carmon2019Unlabeled"


def parts(name: str) -> tuple[str, str, str]:
    """Return data set, threat model and identifier of ``DATA/THREAT/ID``; the package is not imported.

    Raises:
        UsageError: the name has another form.
    """
    found = name.split("/")
    if len(found) != 3 or found[0] not in CLASSES or found[1] not in _SETTINGS or not found[2]:
        raise UsageError(
            f"a model of RobustBench is named as in {_FORM}, with {', '.join(CLASSES)} and {', '.join(_SETTINGS)}; "
            f"got robustbench/{name}"
        )
    return found[0], found[1], found[2]


def threat_of(name: str) -> ThreatModel | None:
    """Return the threat model of the leaderboard to which ``DATA/THREAT/ID`` belongs; None for corruptions."""
    dataset, setting, _ = parts(name)
    radius = _RADII.get((dataset, setting))
    return None if radius is None else ThreatModel("l2" if setting == "L2" else "linf", radius)


def create(name: str) -> nn.Module:
    """Build the architecture of ``DATA/THREAT/ID`` with fresh weights.

    Raises:
        UsageError: the zoo does not have the identifier, or it is an ensemble of several files.
        EnvironmentProblem: the package robustbench cannot be imported.
    """
    module: nn.Module = _entry(name)["model"]()
    return module


def load(name: str) -> nn.Module:
    """Return the model of ``DATA/THREAT/ID`` with its published weights, in eval mode.

    The file is looked for in ``models/`` of the working directory, where RobustBench puts it, then in the cache folder,
    where it is downloaded to if it is missing.

    Raises:
        UsageError: as `create`.
        EnvironmentProblem: the package cannot be imported, or the weights cannot be downloaded.
    """
    dataset, setting, identifier = parts(name)
    _entry(name)
    from robustbench.utils import load_model  # type: ignore[import-not-found]

    file = Path(dataset) / setting / f"{identifier}.pt"
    folder = Path("models") if (Path("models") / file).is_file() else data_root() / "robustbench"
    try:
        with _quiet():
            model: nn.Module = load_model(identifier, model_dir=folder, dataset=dataset, threat_model=setting)
    except Exception as error:  # its downloads and its loader raise errors of many kinds
        reason = one_line(error, 160)
        # A download that failed may leave an empty or partial file, which would be taken for the weights next time.
        raise EnvironmentProblem(
            f"cannot load {identifier} of RobustBench ({reason}). Put its file at {folder / file}, or connect to the "
            "internet; remove a damaged file there."
        ) from error
    return model


def _entry(name: str) -> dict[str, Any]:
    dataset, setting, identifier = parts(name)
    try:
        with _quiet():
            from robustbench.model_zoo.enums import BenchmarkDataset  # type: ignore[import-not-found]
            from robustbench.model_zoo.enums import ThreatModel as Setting
            from robustbench.model_zoo.models import model_dicts  # type: ignore[import-not-found]
    except ImportError as error:
        raise EnvironmentProblem(
            f"models of RobustBench need its package, which cannot be imported ({error}): pip install "
            '"setuptools<81" git+https://github.com/RobustBench/robustbench.git'
        ) from error
    known = model_dicts[BenchmarkDataset(dataset)].get(Setting(setting), {})
    if identifier not in known:
        raise UsageError(
            f"RobustBench has no model {identifier} for {dataset} and {setting}.{did_you_mean(identifier, known)}"
        )
    entry: dict[str, Any] = known[identifier]
    if isinstance(entry.get("gdrive_id"), list):
        raise UsageError(f"{identifier} of RobustBench is an ensemble of several networks, which is not supported.")
    return entry


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
