"""Data sets in an .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError
from .base import DataBundle, TensorImages, mixing_order

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path, class_names: tuple[str, ...] = ()) -> DataBundle:
    """Read ``x_train``, ``y_train``, ``x_test`` and ``y_test``; images are uint8 [N, H, W, C] or [N, H, W].

    The validation part is empty; see `hold_out`.

    Args:
        path: the file.
        class_names: name of each class; by default its number.

    Raises:
        UsageError: the file is missing, is not an .npz or lacks an array, or an array has a wrong shape, type or range.
    """
    arrays = _read(path)
    train, test = (_image_set(path, arrays, part) for part in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UsageError(f"{path}: x_train holds images of {train.images.shape[1:]}, x_test of {test.images.shape[1:]}")
    count = int(train.labels.max()) + 1
    if int(test.labels.max()) >= count:
        raise UsageError(f"{path}: y_test holds the label {int(test.labels.max())}, y_train goes to {count - 1} only")
    if count < 2:
        raise UsageError(f"{path}: y_train holds a single class; at least 2 are needed")
    if class_names and count > len(class_names):
        raise UsageError(f"{path}: label {count - 1} found, but only {len(class_names)} class names given")
    mean, std = channel_statistics(train.images)
    empty = TensorImages(train.images[:0], train.labels[:0])
    channels, height, width = train.images.shape[1:]
    return DataBundle(
        name=path.name,
        train=train,
        validation=empty,
        test=test,
        class_names=class_names or tuple(str(i) for i in range(count)),
        mean=mean,
        std=std,
        input_size=(channels, height, width),
    )


def channel_statistics(images: torch.Tensor, limit: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, in [0, 1], of uint8 images [N, C, H, W].

    About `limit` evenly spaced images are used.
    """
    chosen = images[:: max(1, len(images) // limit)].float() / 255
    mean, std = chosen.mean((0, 2, 3)), chosen.std((0, 2, 3)).clamp_min(1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UsageError(f"data file {path} does not exist. Give an .npz with {', '.join(KEYS)}.")
    try:
        with np.load(path, allow_pickle=False) as data:
            missing = [key for key in KEYS if key not in data.files]
            if missing:
                raise UsageError(f"{path} lacks {', '.join(missing)}; found {', '.join(data.files) or 'nothing'}")
            return {key: data[key] for key in KEYS}
    except UsageError:
        raise
    except Exception as error:  # numpy raises zipfile, zlib, value and OS errors for a damaged file
        raise UsageError(f"{path} is not a readable .npz: {error}") from error


def _image_set(path: Path, arrays: dict[str, np.ndarray], part: str) -> TensorImages:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.dtype != np.uint8:
        raise UsageError(f"{path}: x_{part} must be uint8 in 0..255, got {x.dtype}. Multiply floats by 255 and round.")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[-1] not in (1, 3, 4):
        raise UsageError(f"{path}: x_{part} must be [N, H, W, C] with 1, 3 or 4 channels, got {x.shape}")
    if len(x) == 0:
        raise UsageError(f"{path}: x_{part} holds no images")
    if not np.issubdtype(y.dtype, np.integer):
        raise UsageError(f"{path}: y_{part} must hold integers, got {y.dtype}")
    y = y.reshape(-1)
    if len(x) != len(y):
        raise UsageError(f"{path}: {len(x)} images in x_{part} but {len(y)} labels in y_{part}")
    if int(y.min()) < 0:
        raise UsageError(f"{path}: y_{part} holds the negative label {int(y.min())}")
    if 0 in x.shape:
        raise UsageError(f"{path}: x_{part} holds empty images, {x.shape}")
    labels = torch.from_numpy(y.astype(np.int64))
    order = mixing_order(labels)
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)[order.numpy()]))
    return TensorImages(images, labels[order])
