"""Data from Python objects: arrays, torch datasets and data sets of Hugging Face's library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UsageError
from .base import DataBundle, TensorImages
from .bundles import in_memory
from .checks import checked_images
from .folder import ClassOrder
from .hugging_face import from_splits, is_table
from .sources import load_data
from .splits import finished

DataSource: TypeAlias = str | Path | DataBundle | Mapping[str, Any]
"""Types that `as_data` accepts."""

_PARTS = ("train", "validation", "test")


def as_data(
    source: DataSource,
    *,
    validation: int | None = None,
    class_names: Sequence[str] = (),
    name: str = "data",
    image_size: int | tuple[int, int] | None = None,
    crop_fraction: float = 1.0,
    class_order: ClassOrder = "text",
) -> DataBundle:
    """Return a bundle of training, held-out and test images.

    Args:
        source: a name or path (see `load_data`), a bundle, which is returned unchanged, or a mapping with ``train``,
            ``test`` and optionally ``validation``: a `datasets.DatasetDict`, or for each part a torch ``Dataset`` of
            (image, label) pairs or a pair of arrays. Images are uint8 [N, C, H, W] or [N, H, W, C], or float in [0, 1],
            which is rounded to uint8.
        validation: number of training images to hold out if the source has no held-out images; by default a tenth, at
            most 1000.
        class_names: name of each class, for arrays and datasets; by default its number.
        name: name of the data set, for arrays and datasets.
        image_size: side, or (height, width), to which images of a folder or a Hugging Face data set are resized.
        crop_fraction: share of the sides of the centre crop that is kept of these images, in (0, 1]; 0.875 is usual for
            ImageNet.
        class_order: how the classes of a folder are numbered, ``text`` or ``natural``; see `load_folder`.

    Raises:
        UsageError: a type is wrong, a part is missing or empty, images and labels do not match, images show nothing, or
            parts share images.
        EnvironmentProblem: as `load_data`.
    """
    if isinstance(source, DataBundle):
        for part, found in (("training", source.train), ("test", source.test)):
            if len(found) == 0:
                raise UsageError(f"{source.name} has no {part} images")
        return source
    if isinstance(source, str | Path):
        return load_data(
            source, validation=validation, image_size=image_size, crop_fraction=crop_fraction, class_order=class_order
        )
    if is_table(source) and not isinstance(source, Mapping):
        raise UsageError("a single split has no test images. Give {'train': ..., 'test': ...}, or a DatasetDict.")
    if not isinstance(source, Mapping):
        raise UsageError(
            "data are a name such as 'cifar10', a path, what load_data returned, or a dict with 'train' and 'test'; "
            f"got {type(source).__module__}.{type(source).__qualname__}."
        )
    if source and all(is_table(part) for part in source.values()):
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        return finished(from_splits(source, name, image_size=size, crop_fraction=crop_fraction), validation)
    if crop_fraction != 1:
        raise UsageError("crop_fraction crops images of folders and Hugging Face data sets, not arrays. Leave it out.")
    unknown = sorted(map(str, set(source) - set(_PARTS)))
    if unknown or "train" not in source or "test" not in source:
        raise UsageError(
            f"data need 'train' and 'test' (and may have 'validation'), got {', '.join(map(str, source)) or 'none'}."
        )
    parts = {part: _images(source[part], part) for part in _PARTS if part in source}
    return finished(in_memory(name, parts, tuple(class_names)), validation)


def _images(value: Any, part: str) -> TensorImages:
    if isinstance(value, TensorImages):
        value = value.images, value.labels
    elif isinstance(value, Dataset):
        value = _items(value, part)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UsageError(f"{part} must be a torch Dataset or a pair (images, labels), got {type(value).__qualname__}.")
    return checked_images(value[0], value[1], f"{part} images", f"{part} labels")


def _items(dataset: Any, part: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a torch dataset, each stacked."""
    try:
        pairs = [dataset[i] for i in range(len(dataset))]
    except Exception as error:  # a user's dataset may raise any error
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"the {part} dataset cannot be read: {type(error).__name__}: {reason}") from error
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise UsageError(f"the {part} dataset must give (image, label) pairs, and at least one.")
    try:
        images = [torch.from_numpy(np.array(image)) for image, _ in pairs]
        labels = torch.tensor([_number(label) for _, label in pairs])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"the {part} dataset must give images and whole numbers as labels: {reason}") from error
    shapes = {(tuple(image.shape), image.dtype) for image in images}
    if len(shapes) > 1:
        (one, _), (two, _) = sorted(shapes, key=str)[:2]
        raise UsageError(
            f"the {part} dataset gives images of different shapes or types, such as {one} and {two}. "
            "Resize them in its transform."
        )
    return torch.stack(images), labels


def _number(label: Any) -> int | float:
    """Return a label as a Python number, of which only whole ones become classes."""
    found: int | float = label.item() if hasattr(label, "item") else label
    return found
