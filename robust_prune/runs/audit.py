"""Whether the files of a run folder are those that the run wrote."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UsageError
from ..printable import printable
from .files import file_sha256, read_json
from .run import FORMAT, RECORD, is_sealed


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
    stages = found.get("stages")
    missing = (
        [name for name in stages if not (folder / str(name) / RECORD).is_file()] if isinstance(stages, list) else []
    )
    problems, count = [f"{folder / printable(str(name)) / RECORD} is missing" for name in missing], 0
    for record in sorted(folder.glob(f"*/{RECORD}")):
        count += 1
        try:
            stored = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            stored = None
        if not isinstance(stored, dict) or not is_sealed(stored) or not isinstance(stored.get("files"), dict):
            problems.append(f"{record} is damaged or was changed")
            continue
        for name, sha256 in stored["files"].items():
            count += 1
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                problems.append(f"{record} names {printable(name)}, which lies elsewhere")
            elif not file.is_file():
                problems.append(f"{file} is missing")
            elif file_sha256(file) != sha256:
                problems.append(f"{file} is damaged or was changed")
    return problems, count
