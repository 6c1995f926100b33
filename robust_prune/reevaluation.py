"""Models of finished runs, attacked anew in one way, so that they can stand in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from .errors import QualityGateError, UsageError
from .evaluation.card import ResultCard
from .evaluation.kept import Terms, evaluate_once
from .evaluation.onnx_scores import OnnxModel
from .introspect.fingerprint import models_hash
from .models import artifact
from .models.foreign import check_data
from .report.rows import PRUNED, TRAINED
from .report.types import ModelRow, RunReport
from .runs.files import file_sha256


@dataclass(frozen=True)
class Subject:
    """A model of a run, with its files, which were compared with the report of the run.

    Attributes:
        run: name of the run.
        file: the file of the model.
        row: row of the model in the report.
        reduced: rows of its files of lower precision.
        exported: its ONNX files by precision.
    """

    run: str
    file: Path
    row: ModelRow
    reduced: tuple[ModelRow, ...]
    exported: Mapping[str, Path]


def reevaluate(
    runs: Mapping[str, tuple[Path, RunReport]], terms: Terms, progress: Path, arch: str | None = None
) -> dict[str, RunReport]:
    """Return the reports of runs with the accuracies of their models measured anew, on the same images by one attack.

    Every file is opened and compared with the report before the first attack begins. What is done is in the cache, and
    what was begun in files below `progress`, so that an interrupted call goes on.

    Args:
        runs: folder and report of each run, by name.
        terms: images, attacks and cache.
        progress: folder of unfinished evaluations, whose files are removed at the end.
        arch: ``file.py:function`` of the models whose architecture is a user's file.

    Raises:
        UsageError: a folder lacks a file, or a model does not fit the data.
        QualityGateError: a file is not the one that the report is about, or as `evaluate`.
    """
    subjects = [found for name, (folder, run) in runs.items() for found in _subjects(name, folder, run)]
    for one in subjects:
        _check(one, terms, arch)
    states = [progress / f"evaluation-{number}.state.npz" for number in range(len(subjects))]
    rows: dict[str, list[ModelRow]] = {name: [] for name in runs}
    for one, state in zip(subjects, states, strict=True):
        model = artifact.load(one.file, arch=arch)
        files = {precision: OnnxModel(file) for precision, file in one.exported.items()}
        card = evaluate_once(model, one.row.label, terms, exported=files, state_path=state)
        rows[one.run] += [_with(card, one.row), *(replace(_with(card, row), card=None) for row in one.reduced)]
    for state in states:
        state.unlink(missing_ok=True)
    return {name: replace(run, models=tuple(rows[name])) for name, (_, run) in runs.items()}


def _subjects(name: str, folder: Path, run: RunReport) -> Iterator[Subject]:
    rows: Sequence[ModelRow] = run.models
    while rows:
        row, *others = rows
        reduced = tuple(takewhile(lambda other: other.card is None, others))
        rows = others[len(reduced) :]
        file = "model" if row.label in (PRUNED, TRAINED) else row.label
        # The folder may have been moved since the files were written.
        exported = {
            str(each.onnx.precision): folder / Path(each.onnx.path).name for each in (row, *reduced) if each.onnx
        }
        yield Subject(name, folder / f"{file}.safetensors", row, reduced, exported)


def _check(one: Subject, terms: Terms, arch: str | None) -> None:
    """Raise UsageError or QualityGateError if a model or file of a run cannot be evaluated again."""
    row, card = one.row, one.row.card
    if card is None or not one.file.is_file():
        raise UsageError(
            f"{one.file} is not there, so the {row.label} model of {one.run} cannot be evaluated again. Give the whole "
            "folder of a run; those of earlier versions lack the dense model, so give their commands again."
        )
    model = artifact.load(one.file, arch=arch)
    if models_hash(model.module) != card.model_hash:
        raise QualityGateError(f"{one.file} is not the {row.label} model that the run evaluated.")
    check_data(model.spec, num_classes=terms.data.num_classes, input_size=terms.data.input_size)
    for each in (row, *one.reduced):
        if each.onnx is None:
            continue
        file = one.exported[each.onnx.precision]
        if not file.is_file():
            raise UsageError(f"{file} is not there. Give the whole folder of the run.")
        if file_sha256(file) != each.onnx.sha256:
            raise QualityGateError(f"{file} is not the file that the run wrote.")


def _with(card: ResultCard, row: ModelRow) -> ModelRow:
    row = replace(row, card=card)
    if row.onnx is None:
        return row
    file = card.exported[row.onnx.precision]
    return replace(row, onnx_clean=file.clean, onnx_robust=file.robust)
