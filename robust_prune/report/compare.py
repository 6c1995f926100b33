"""Comparison of several runs in one report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Never

from ..errors import UsageError
from ..evaluation.card import Accuracy
from ..printable import check_plain, printable
from ..runs.files import LONGEST_JSON
from ..serialization import from_json
from .types import ModelRow, RunReport

RESULT = "result.json"
MOST_MODELS = 200
"""Largest number of models of a result that is read."""


def load_run(path: str | Path) -> RunReport:
    """Return the report of a run folder or of its ``result.json``.

    Raises:
        UsageError: there is no ``result.json``, or it is not a result of robust-prune.
    """
    path = Path(path)
    file = path / RESULT if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} holds no {RESULT}. Give the folder of a finished run.")
    try:
        if file.stat().st_size > LONGEST_JSON:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
        found = from_json(RunReport, value)
    except (ValueError, OSError, RecursionError, UsageError) as error:
        said = printable(" ".join(str(error).split()))[:300]
        raise UsageError(f"{file} is not a result of robust-prune ({said}).") from error
    check_plain(value, str(file))
    if not 0 < len(found.models) <= MOST_MODELS or any(
        "\n" in text for text in (found.title, *(m.label for m in found.models))
    ):
        raise UsageError(f"{file} is not a result of robust-prune (its models or their names).")
    return found


def _no_number(text: str) -> Never:
    raise ValueError(f"it holds {text}, which is not a number")


def compare(runs: Mapping[str, RunReport], command: str = "") -> RunReport:
    """Return one report on the models of several runs.

    Runs with the same dense file and the same accuracies share the row of the dense model of the first of them. Each
    speed-up is relative to the dense file of its own run, with which it was interleaved; compare speed-ups across runs,
    not milliseconds.

    Args:
        runs: two or more reports by name; the name becomes part of the models' labels.
        command: command line that reproduces the report.

    Raises:
        UsageError: there are fewer than two runs, a run has no models, or robust accuracies cannot be compared because
            they differ in threat model, tier, attack, data or number of images.
    """
    if len(runs) < 2:
        raise UsageError(f"a comparison needs at least two runs, got {len(runs)}.")
    _check_comparable(runs)
    models: list[ModelRow] = []
    known: dict[object, str] = {}
    for name, run in runs.items():
        dense, *others = run.models
        identity = _identity(dense)
        if identity not in known:
            known[identity] = name
            models.append(dense if len(known) == 1 else replace(dense, label=f"{name} {dense.label}"))
        models += [replace(model, label=f"{name} {model.label}") for model in others]
    first = next(iter(runs.values()))
    unpaired = ""
    if len({_images(run) for run in runs.values()}) > 1:
        models = [_without_verdicts(model) for model in models]
        unpaired = "The runs' test images may be other files, so changes of accuracy stand without paired intervals."
    return RunReport(
        title=f"{len(runs)} runs side by side",
        command=command,
        recipe={},
        notes=(
            "Each run was timed by itself: a speed-up is against the dense file of its own run; milliseconds of "
            "different runs may come from different moments of the machine, or from different machines.",
            *([unpaired] if unpaired else []),
            *dict.fromkeys(note for run in runs.values() for note in run.notes),
        ),
        models=tuple(models),
        environment={name: run.environment for name, run in runs.items()},
        seconds={name: sum(run.seconds.values()) for name, run in runs.items()},
        created=max(run.created for run in runs.values()),
        version=", ".join(dict.fromkeys(run.version for run in runs.values())),
        class_names=first.class_names if all(run.class_names == first.class_names for run in runs.values()) else (),
        latency_protocol=next((run.latency_protocol for run in runs.values() if run.latency_protocol), ""),
    )


def run_names(paths: Sequence[str | Path]) -> list[str]:
    """Return a short name for each run: the end of its folder's path, as long as needed to be unique.

    Raises:
        UsageError: the same run was given twice.
    """
    parts = [(p.parent if p.name == RESULT else p).absolute().parts for p in map(Path, paths)]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"the same run was given twice: {', '.join(map(str, paths))}.")


def _identity(model: ModelRow) -> object:
    card = model.card
    outcome = (card.clean, card.robust) if card else None
    return (model.onnx.sha256 if model.onnx else model.label, outcome)


def _check_comparable(runs: Mapping[str, RunReport]) -> None:
    first: tuple[str, tuple[object, ...]] | None = None
    for name, run in runs.items():
        if not run.models:
            raise UsageError(f"run {name} holds no models.")
        card = next((m.card for m in run.models if m.card), None)
        if card is None:
            continue
        terms = (card.threat, card.tier, card.attack, card.data, card.clean.total)
        if first is None:
            first = name, terms
        elif terms != first[1]:
            here, there = (f"{t[2]} at {t[0]} on {t[4]} images of {t[3]}" for t in (terms, first[1]))
            raise UsageError(
                f"robust accuracies of {name} ({here}) and {first[0]} ({there}) cannot stand in one table. "
                "Evaluate all models in the same way with --reevaluate aa-fast, or another tier."
            )


def _images(run: RunReport) -> str:
    return next((model.card.images_hash for model in run.models if model.card), "")


def _without_verdicts(model: ModelRow) -> ModelRow:
    """Return the row with numbers of correct predictions only, which are compared without pairs of images."""

    def plain(accuracy: Accuracy | None) -> Accuracy | None:
        return accuracy and replace(accuracy, right="")

    card = model.card and replace(
        model.card, clean=replace(model.card.clean, right=""), robust=replace(model.card.robust, right="")
    )
    return replace(model, card=card, onnx_clean=plain(model.onnx_clean), onnx_robust=plain(model.onnx_robust))
