"""Shards of WebDataset are looked through before they are read: what is torn would be left out silently."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..console import track
from ..errors import UsageError

CLASS = "cls"
_EXPECTED = "Expected 0001.cls, which holds the number of the class, directly before or after 0001.jpg."
Sample = tuple[str, dict[str, tarfile.TarInfo]]
"""Key of a sample, and its members by suffix."""


def check_shards(paths: Sequence[Path], images: frozenset[str]) -> None:
    """Check that shards are whole, and that every image stands beside the number of its class.

    Args:
        paths: the shards of all splits, one at least.
        images: suffixes of images, such as ``.jpg``.

    Raises:
        UsageError: a shard is damaged, ends early or holds nothing, a sample has no class or no image or several, or
            images have several suffixes.
    """
    kinds: dict[str, str] = {}
    with track("Looking through shards", len(paths)) as advance:
        for path in paths:
            number = -1
            for number, (key, members) in enumerate(_samples(path)):
                found = [suffix for suffix in members if f".{suffix}".lower() in images]
                sample = f"{path}: the sample {key}"
                if CLASS not in members:
                    raise UsageError(f"{sample} has {_listed(members)} and no {CLASS}. {_EXPECTED}")
                if len(found) != 1:
                    raise UsageError(f"{sample} has {len(found)} images ({_listed(members)}). {_EXPECTED}")
                kinds.setdefault(found[0], sample)
                if len(kinds) > 1:
                    (one, first), (other, later) = kinds.items()
                    raise UsageError(
                        f"{first} is a .{one} and {later} a .{other} file. Store images of all shards with one suffix."
                    )
                if number == 0:
                    _check_class(path, key, members[CLASS])
            if number < 0:
                raise UsageError(f"{path} holds no images. Remove it.")
            advance(1)


def _samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard: files in a row with equal names up to the first dot."""
    try:
        with tarfile.open(path) as shard:
            key, members = "", dict[str, tarfile.TarInfo]()
            for member in shard:
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                if not member.isfile() or not stem or not suffix:
                    continue
                if members and str(name.parent / stem) != key:
                    yield key, members
                    members = {}
                key = str(name.parent / stem)
                members[suffix] = member
            if members:
                yield key, members
            _check_end(path, shard)
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} cannot be read as a shard of WebDataset: {reason}. Make it again.") from error


def _check_end(path: Path, shard: tarfile.TarFile) -> None:
    """Refuse an archive without its mark of the end: `tarfile` stops at a damaged header as if it were the end."""
    stream: Any = shard.fileobj
    stream.seek(shard.offset)
    rest = stream.read()
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise UsageError(f"{path} is damaged, or ends before its end. Make it again.")


def _check_class(path: Path, key: str, member: tarfile.TarInfo) -> None:
    with tarfile.open(path) as shard:
        stream = shard.extractfile(member)
        text = stream.read(100) if stream is not None else b""
    if not text.strip().isdigit():
        raise UsageError(f"{path}: {key}.{CLASS} holds {text[:40]!r}. {_EXPECTED}")


def _listed(members: dict[str, tarfile.TarInfo]) -> str:
    return ", ".join(members)
