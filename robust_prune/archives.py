"""Zip archives, such as .npz files and those of torch.save, that would be far larger in memory than on disk."""

from __future__ import annotations

import zipfile
from pathlib import Path

import psutil

from .errors import UsageError

FREE_BYTES, LARGEST_RATIO = 1 << 30, 100
"""Bytes that any archive may hold, and largest ratio of its contents to its size above that. Images are compressed by
less than that; a zip file of zeros can hold a thousand times its size."""


def check_archive(path: Path) -> None:
    """Refuse an archive whose contents are out of proportion to its size, or larger than the free memory.

    Other kinds of files and damaged archives pass; whatever opens them says what is wrong.

    Raises:
        UsageError: see above.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return
    if inside > FREE_BYTES and inside > LARGEST_RATIO * path.stat().st_size:
        raise UsageError(
            f"{path} has {path.stat().st_size:,} bytes and says that it holds {inside:,}. It is damaged, or made to "
            "fill the memory."
        )
    if inside > (free := psutil.virtual_memory().available):
        raise UsageError(f"{path} holds {inside / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free.")
