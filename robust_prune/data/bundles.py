"""Bundles of parts that a source has given."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import UsageError
from .base import DataBundle, ImageSet, Subset, TensorImages, labels_of
from .checks import check_pixels, class_names_of

_STATISTICS_IMAGES, _CHECKED_IMAGES = 1024, 64


def in_memory(
    name: str, parts: dict[str, TensorImages], class_names: tuple[str, ...] = (), labels: dict[str, str] | None = None
) -> DataBundle:
    """Return the bundle of parts in memory, ``train``, ``test`` and possibly ``validation``.

    Args:
        name: name of the data set.
        parts: images of each part.
        class_names: name of each class; by default its number.
        labels: name of each part's labels in messages; by default e.g. ``train labels``.

    Raises:
        UsageError: images of the parts differ in shape, or labels are wrong; see `class_names_of`.
    """
    train = parts["train"]
    channels, height, width = shape = tuple(train.images.shape[1:])
    for part, images in parts.items():
        if tuple(images.images.shape[1:]) != shape:
            raise UsageError(f"train holds images of {shape}, {part} of {tuple(images.images.shape[1:])}")
    said = labels or {part: f"{part} labels" for part in parts}
    names, notes = class_names_of({said[part]: images.labels for part, images in parts.items()}, class_names)
    mean, std = channel_statistics(train.images)
    empty = TensorImages(train.images[:0], train.labels[:0])
    return DataBundle(
        name,
        train,
        parts.get("validation", empty),
        parts["test"],
        names,
        mean,
        std,
        (channels, height, width),
        notes=notes,
    )


def of_any_kind(
    name: str,
    parts: Mapping[str, ImageSet],
    class_names: tuple[str, ...],
    input_size: tuple[int, int, int],
    notes: tuple[str, ...],
    seed: int,
) -> DataBundle:
    """Return the bundle of parts that may be decoded on access, of which a few random images are looked at.

    Args:
        name: name of the data set.
        parts: images of ``train``, ``test`` and possibly ``validation``.
        class_names: name of each class; empty if it is its number.
        input_size: (channels, height, width) of the images.
        notes: what a report must say of the data set.
        seed: random seed of the choice.

    Raises:
        UsageError: the images show nothing, or labels are wrong; see `check_pixels` and `class_names_of`.
    """
    names, absent = class_names_of({f"{name}: {part}": labels_of(parts[part]) for part in parts}, class_names)
    for part, images in parts.items():
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        probe, _ = images.get(order[: _STATISTICS_IMAGES if part == "train" else _CHECKED_IMAGES])
        check_pixels(probe, f"{name}: {part} images")
        if part == "train":
            mean, std = channel_statistics(probe)
    empty = Subset(parts["train"], torch.zeros(0, dtype=torch.int64))
    validation = parts.get("validation", empty)
    return DataBundle(
        name, parts["train"], validation, parts["test"], names, mean, std, input_size, notes=(*notes, *absent)
    )


def channel_statistics(images: torch.Tensor, limit: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, in [0, 1], of uint8 images [N, C, H, W].

    About `limit` evenly spaced images are used.
    """
    chosen = images[:: max(1, len(images) // limit)].float() / 255
    mean, std = chosen.mean((0, 2, 3)), chosen.std((0, 2, 3)).clamp_min(1e-3)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
