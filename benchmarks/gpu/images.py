"""CIFAR-10 as sheets of lossless WebP, which have two thirds of the size of an .npz; packing and unpacking."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ACROSS = 40
SHEET = 2000
SPLITS = ("train", "test")


def pack(source: Path, target: Path) -> None:
    """Write the images of an .npz (x_train, y_train, x_test, y_test; uint8 [N, H, W, C]) to `target`, a zip file."""
    with np.load(source) as stored, zipfile.ZipFile(target, "w") as archive:
        shapes = {}
        for split in SPLITS:
            images, labels = stored[f"x_{split}"], stored[f"y_{split}"]
            shapes[split] = [len(images), *images.shape[1:]]
            archive.writestr(f"{split}.labels", np.asarray(labels, np.uint8).tobytes())
            for number, start in enumerate(range(0, len(images), SHEET)):
                sheet = io.BytesIO()
                Image.fromarray(_tiled(images[start : start + SHEET])).save(
                    sheet, "webp", lossless=True, quality=20, method=2
                )
                archive.writestr(f"{split}.{number:03}.webp", sheet.getvalue())
        archive.writestr("shapes.json", json.dumps(shapes))


def unpack(source: Path, folder: Path) -> Path:
    """Write ``<name>.npz`` to `folder` from ``<name>.zip`` written by `pack`, and return its path."""
    arrays = {}
    with zipfile.ZipFile(source) as archive:
        for split, (count, height, width, channels) in json.loads(archive.read("shapes.json")).items():
            sheets = sorted(
                name for name in archive.namelist() if name.startswith(f"{split}.") and name.endswith(".webp")
            )
            pixels = [
                _untiled(np.asarray(Image.open(io.BytesIO(archive.read(name)))), height, width) for name in sheets
            ]
            arrays[f"x_{split}"] = np.concatenate(pixels)[:count, ..., :channels]
            arrays[f"y_{split}"] = np.frombuffer(archive.read(f"{split}.labels"), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}.npz"
    part = target.with_suffix(".part.npz")
    np.savez(part, **arrays)
    return part.replace(target)


def _tiled(images: np.ndarray) -> np.ndarray:
    """Return images [N, H, W, 3] as one picture with `ACROSS` images in each row, padded with black."""
    count, height, width, channels = images.shape
    rows = -(-count // ACROSS)
    padded = np.zeros((rows * ACROSS, height, width, channels), np.uint8)
    padded[:count] = images
    return padded.reshape(rows, ACROSS, height, width, channels).swapaxes(1, 2).reshape(rows * height, -1, channels)


def _untiled(sheet: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = len(sheet) // height
    return sheet.reshape(rows, height, ACROSS, width, -1).swapaxes(1, 2).reshape(rows * ACROSS, height, width, -1)


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1]), Path(sys.argv[2])))
