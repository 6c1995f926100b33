"""Data that Python has in its hands: arrays and torch datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UsageError
from .base import DataBundle, TensorImages
from .npz import channel_statistics
from .sources import held_out, load_data

DataSource: TypeAlias = str | Path | DataBundle | Mapping[str, Any]
"""What `as_data` takes."""

_PARTS = ("train", "validation", "test")


def as_data(
    source: DataSource, *, validation: int | None = None, class_names: Sequence[str] = (), name: str = "data"
) -> DataBundle:
    """A bundle of training, held-out and test images.

    Args:
        source: a name (``cifar10``, ``cifar100``, ``svhn``, ``fashion_mnist``, or ``sample`` for the embedded images),
            a path to an ``.npz`` or a folder (see `data.sources.load_data`), a bundle, which comes back as it is, or a
            mapping with ``train``, ``test`` and perhaps ``validation``, each a torch ``Dataset`` of (image, label)
            pairs or a pair of arrays. Images are uint8 [N, C, H, W] or [N, H, W, C], or float in [0, 1], which is
            rounded to 255ths.
        validation: training images to hold out where the source has no held-out ones.
        class_names: one a class, for arrays and datasets; numbers by default.
        name: of arrays and datasets.

    Raises:
        UsageError: a wrong type, a missing part, or images and labels that do not fit each other.
    """
    if isinstance(source, DataBundle):
        return source
    if isinstance(source, str | Path):
        return load_data(source, validation=validation)
    if not isinstance(source, Mapping):
        raise UsageError(
            "data are a name such as 'cifar10', a path, what load_data returned, or a dict with 'train' and 'test'; "
            f"got {type(source).__module__}.{type(source).__qualname__}."
        )
    unknown = sorted(set(source) - set(_PARTS))
    if unknown or "train" not in source or "test" not in source:
        raise UsageError(
            f"data need 'train' and 'test' (and may have 'validation'), got {', '.join(source) or 'none'}."
        )
    parts = {part: _images(source[part], part) for part in _PARTS if part in source}
    train = parts["train"]
    shape = train.images.shape[1:]
    for part, images in parts.items():
        if images.images.shape[1:] != shape:
            raise UsageError(f"train holds images of {tuple(shape)}, {part} of {tuple(images.images.shape[1:])}")
    count = 1 + max(int(images.labels.max()) for images in parts.values() if len(images))
    names = tuple(class_names) or tuple(str(i) for i in range(count))
    if len(names) < count:
        raise UsageError(f"label {count - 1} found, but only {len(names)} class names given")
    mean, std = channel_statistics(train.images)
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    empty = TensorImages(train.images[:0], train.labels[:0])
    bundle = DataBundle(name, train, parts.get("validation", empty), parts["test"], names, mean, std, size)
    return held_out(replace(bundle), validation)


def _images(value: Any, part: str) -> TensorImages:
    if isinstance(value, TensorImages):
        return value
    if isinstance(value, Dataset):
        pairs = [value[i] for i in range(len(value))]  # type: ignore[arg-type]
        if not pairs or not isinstance(pairs[0], Sequence) or len(pairs[0]) != 2:
            raise UsageError(f"the {part} dataset must give (image, label) pairs, and at least one.")
        value = torch.stack([_pixels(x, part) for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])
    if not isinstance(value, Sequence) or len(value) != 2:
        raise UsageError(f"{part} must be a torch Dataset or a pair (images, labels), got {type(value).__qualname__}.")
    images, labels = _pixels(value[0], part), torch.as_tensor(np.asarray(value[1])).long()
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if labels.ndim != 1:
        raise UsageError(f"{part} labels must be one class an image, [N], got {tuple(labels.shape)}")
    return TensorImages(images.contiguous(), labels)


def _pixels(value: Any, part: str) -> Tensor:
    """The values as uint8, in whatever order their dimensions are."""
    pixels = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise UsageError(f"{part} images must be uint8, or float in [0, 1], got {pixels.dtype}")
    if pixels.numel() and not (float(pixels.min()) >= 0 and float(pixels.max()) <= 1):
        raise UsageError(
            f"{part} images must be uint8, or float in [0, 1], got values from {float(pixels.min()):.3g} to "
            f"{float(pixels.max()):.3g}. Leave normalization to the model."
        )
    return (pixels * 255).round().to(torch.uint8)
