"""Images from an .npz file."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..archives import check_archive
from ..errors import UsageError
from .base import DataBundle
from .bundles import in_memory
from .checks import checked_images

KEYS = ("x_train", "y_train", "x_test", "y_test")
NAMES = "class_names"
MOST_CLASSES, LONGEST_NAME = 1_000_000, 200


def load_npz(path: Path, class_names: tuple[str, ...] = ()) -> DataBundle:
    """Read ``x_train``, ``y_train``, ``x_test`` and ``y_test``, and ``class_names`` if the file has them.

    Images are uint8, or float in [0, 1], [N, H, W, C] or [N, H, W]. The validation part is empty; see `finished`.

    Args:
        path: the file.
        class_names: name of each class; by default those of the file, else its number.

    Raises:
        UsageError: the file is missing, is not an .npz or lacks an array, or an array has a wrong shape, type or range.
    """
    arrays = _read(path)
    try:
        parts = {
            part: checked_images(
                arrays[f"x_{part}"], arrays[f"y_{part}"], f"x_{part}", f"y_{part}", channels_first=False
            )
            for part in ("train", "test")
        }
        names = class_names or tuple(str(name) for name in np.ravel(arrays.get(NAMES, ())))
        return in_memory(path.name, parts, names, {part: f"y_{part}" for part in parts})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def read_names(path: Path) -> np.ndarray | None:
    """Return the array ``class_names`` of a file, or None, after looking at its size.

    A short file may describe billions of empty names.

    Raises:
        UsageError: the array holds more than `MOST_CLASSES` names, or other values than text of at most
            `LONGEST_NAME` characters and whole numbers.
        Exception: the file is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{NAMES}.npy" not in archive.namelist():
            return None
        with archive.open(f"{NAMES}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(stream)
    if math.prod(shape) > MOST_CLASSES or dtype.kind not in "USiu" or dtype.itemsize > 4 * LONGEST_NAME:
        raise UsageError(
            f"{path}: {NAMES} must be at most {MOST_CLASSES:,} texts of {LONGEST_NAME} characters, got {dtype} "
            f"and the shape {shape}"
        )
    with np.load(path, allow_pickle=False) as data:
        return np.asarray(data[NAMES])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"data file {path} does not exist. Give an .npz with {', '.join(KEYS)}.")
    check_archive(path)
    try:
        with np.load(path, allow_pickle=False) as data:
            missing = [key for key in KEYS if key not in data.files]
            if missing:
                raise UsageError(f"{path} lacks {', '.join(missing)}; found {', '.join(data.files) or 'nothing'}")
            found = {key: data[key] for key in KEYS}
        names = read_names(path)
        return found if names is None else found | {NAMES: names}
    except UsageError:
        raise
    except Exception as error:  # numpy raises zipfile, zlib, value and OS errors for a damaged file
        raise UsageError(f"{path} is not a readable .npz: {error}") from error
