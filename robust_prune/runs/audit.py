"""Whether the files of a run folder are those that the run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import UsageError
from ..printable import printable
from ..serialization import from_json
from .files import file_sha256, read_json
from .run import FORMAT, RECORD, RunInputs, is_sealed, stage_key


def points(folder: Path) -> list[Path]:
    """Return the run folders inside a frontier or a goal, in the order of their ratios; none in another folder."""
    found = [mark.parent for mark in folder.glob("*/run.json")]
    return sorted(found, key=lambda point: (len(point.name.partition(".")[0]), point.name))


def damaged(folder: Path) -> tuple[list[str], int]:
    """Return what is wrong with the records and files of the stages of a run, and the number of files looked at.

    Raises:
        UsageError: `folder` is not a run folder, or its run was made by another version.
    """
    mark = folder / "run.json"
    if not mark.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no run.json. Give the folder of a run.")
    found = read_json(mark)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{folder} was made by another version of robust-prune, which stored no hashes.")
    try:
        key, stages = from_json(RunInputs, found["inputs"]).key, [str(name) for name in found["stages"]]
        problems = _changed(folder, mark, found["files"])
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{mark} is damaged.") from error
    count = 1 + len(found["files"])
    records = sorted(folder.glob(f"*/{RECORD}"))
    missing = sorted(set(stages) - {record.parent.name for record in records})
    problems += [f"{folder / printable(name) / RECORD} is missing" for name in missing]
    for record in records:
        try:
            stored = read_json(record)
            whole = is_sealed(stored) and stored["key"] == stage_key(key, record.parent.name, stored["inputs"])
            files = dict(stored["files"])
        except (UsageError, LookupError, TypeError, ValueError, AttributeError):
            whole, files = False, {}
        problems += [] if whole else [f"{record} is damaged or was changed"]
        problems += _changed(folder, record, files)
        count += 1 + len(files)
    return problems, count


def _changed(folder: Path, record: Path, files: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the files whose hashes a record holds."""
    problems = []
    for name, sha256 in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{record} names {printable(name)}, which lies elsewhere")
        elif not file.is_file():
            problems.append(f"{file} is missing")
        elif file_sha256(file) != sha256:
            problems.append(f"{file} is damaged or was changed")
    return problems
