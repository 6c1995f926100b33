"""Parcels: files for a machine without a network, split into folders that are small enough to be copied one by one.

A parcel is a folder with pieces of files and, in `parcel.json`, the list of all files of the set. Pieces may arrive in
any order and more than once; a file is joined and checked when all of its pieces are there. Only the standard library
is used, so that it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "parcel.json"


@dataclass(frozen=True)
class Item:
    """A file to carry.

    Attributes:
        name: name of the file.
        kind: ``wheel``, ``skeletons``, ``images`` or ``base``.
        bytes: size in bytes.
        sha256: SHA-256 of the file.
        pieces: for each piece of the file, the number of its parcel.
    """

    name: str
    kind: str
    bytes: int
    sha256: str
    pieces: tuple[int, ...]


def split(files: list[tuple[str, Path]], folder: Path, limit: int, commit: str) -> list[Item]:
    """Write `files` (kind, path), in this order, to ``folder/parcel-1``, ``parcel-2``, ...

    Args:
        files: files with distinct names.
        folder: folder of the parcels; former parcels are removed.
        limit: largest number of bytes of pieces in a parcel.
        commit: commit of the checkout to which the parcels belong.

    Returns:
        The items; piece n of an item is in parcel ``pieces[n]``.
    """
    for old in folder.glob("parcel-*"):
        shutil.rmtree(old)
    items, number, room = [], 1, limit
    for kind, path in files:
        content, pieces, start = path.read_bytes(), [], 0
        while start < len(content):
            if room == 0:
                number, room = number + 1, limit
            parcel = folder / f"parcel-{number}"
            parcel.mkdir(parents=True, exist_ok=True)
            piece = content[start : start + room]
            (parcel / _piece(path.name, len(pieces))).write_bytes(piece)
            pieces.append(number)
            start, room = start + len(piece), room - len(piece)
        items.append(Item(path.name, kind, len(content), _sha256(path), tuple(pieces)))
    listed = json.dumps({"commit": commit, "items": [asdict(item) for item in items]}, indent=1)
    for parcel in folder.glob("parcel-*"):
        (parcel / MANIFEST).write_text(listed, encoding="utf-8")
    return items


def read(parcel: Path) -> tuple[str, list[Item]]:
    """Return the commit to which a parcel belongs, and all items of its set.

    Raises:
        SystemExit: the folder is not a parcel.
    """
    try:
        listed = json.loads((parcel / MANIFEST).read_text(encoding="utf-8"))
        items = [Item(**{**item, "pieces": tuple(item["pieces"])}) for item in listed["items"]]
        return str(listed["commit"]), items
    except FileNotFoundError:
        raise SystemExit(f"{parcel} is no parcel: it holds no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{parcel / MANIFEST} is damaged ({error}). Copy the parcel again.") from None


def take(parcel: Path, store: Path) -> None:
    """Copy the pieces of a parcel to `store`, and join complete files in ``store/items``.

    A file of another set with the same name is replaced.

    Raises:
        SystemExit: the folder is not a parcel, or the hash of a joined file differs.
    """
    commit, items = read(parcel)
    pieces, whole = store / "pieces", store / "items"
    for folder in (pieces, whole):
        folder.mkdir(parents=True, exist_ok=True)
    (store / "commit").write_text(commit, encoding="utf-8")
    for item in items:
        target = whole / item.name
        if target.exists() and _sha256(target) == item.sha256:
            continue
        target.unlink(missing_ok=True)
        parts = [pieces / _piece(item.name, n) for n in range(len(item.pieces))]
        for part in parts:
            if (parcel / part.name).exists():
                shutil.copy(parcel / part.name, part)
        if not all(part.exists() for part in parts):
            continue
        made = target.with_suffix(".part")
        with made.open("wb") as stream:
            for part in parts:
                stream.write(part.read_bytes())
        if _sha256(made) != item.sha256:
            made.unlink()
            numbers = ", ".join(map(str, sorted(set(item.pieces))))
            raise SystemExit(
                f"{item.name} came out with other bytes than were packed. Copy its parcels again: {numbers}."
            )
        made.replace(target)
        for part in parts:
            part.unlink()


def missing(parcel: Path, store: Path) -> list[str]:
    """Return the names of the set's files that are not complete in `store`."""
    return [item.name for item in read(parcel)[1] if not (store / "items" / item.name).exists()]


def _piece(name: str, number: int) -> str:
    return f"{name}.{number:02}"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
