"""Arrays and files of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from robust_prune.data.base import ImageSet


def everything(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return images.get(torch.arange(len(images)))


def as_rows(images: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(images)[0]}


def arrays(train: int = 40, test: int = 10, side: int = 8, grey: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (side, side) if grey else (side, side, 3)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train, dtype=np.uint8) % 4,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test, dtype=np.int64) % 4,
    }


def write_npz(path: Path, **changes: Any) -> Path:
    np.savez(path, **{k: v for k, v in (arrays() | changes).items() if v is not None})
    return path


def write_class_folders(root: Path, side: int, count: int = 4) -> None:
    """Random colour images of two classes, a and b, in ``train/`` and ``test/``."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
                image.save(root / part / label / f"{number}.png")
