"""Checks of images and labels that come from outside; what is wrong is said in one line, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .base import TensorImages

_MOST_CLASSES = 1_000_000
_NAMED = 5
"""Largest number of labels or classes that a message lists."""


def checked_images(x: Any, y: Any, images: str, labels: str, *, channels_first: bool = True) -> TensorImages:
    """Return images and labels in memory, whatever their form.

    Args:
        x: uint8, or float in [0, 1], which is rounded to uint8; [N, H, W, C], [N, H, W] or [N, C, H, W] with 1, 3 or 4
            channels; [N, C, H, W] may have any number.
        y: integers [N] or [N, 1], at least 0.
        images, labels: names of the two in messages.
        channels_first: whether [N, C, H, W] is allowed.

    Raises:
        UsageError: a type, shape or value is wrong, there are no images, or they show nothing.
    """
    pixels, classes = _pixels(x, images), checked_labels(y, labels)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    elif channels_first and pixels.ndim == 4 and (pixels.shape[1] in (1, 3) or pixels.shape[3] not in (1, 3, 4)):
        pixels = pixels.permute(0, 2, 3, 1)
    forms = "[N, H, W, C] or [N, C, H, W]" if channels_first else "[N, H, W, C]"
    if pixels.ndim != 4 or (not channels_first and pixels.shape[3] not in (1, 3, 4)):
        raise UsageError(f"{images} must be {forms} with 1, 3 or 4 channels, got {_shape(pixels)}")
    if len(pixels) == 0:
        raise UsageError(f"{images}: there are no images")
    if pixels.numel() == 0:
        raise UsageError(f"{images}: the images are empty, {_shape(pixels)}")
    if len(pixels) != len(classes):
        raise UsageError(f"{len(pixels)} images in {images} but {len(classes)} labels in {labels}")
    found = TensorImages(pixels.permute(0, 3, 1, 2), classes)
    check_pixels(found.images, images)
    return found


def check_pixels(images: Tensor, what: str) -> None:
    """Refuse images (uint8, any shape) that hold a single value, or only 0 and 1.

    Raises:
        UsageError: see above; the message names `what`.
    """
    low, high = int(images.min()), int(images.max())
    if (low, high) == (0, 1):
        raise UsageError(
            f"{what}: only the values 0 and 1 occur, as when floats in [0, 1] are cast to uint8. "
            "Multiply by 255 before casting."
        )
    if low == high:
        raise UsageError(f"{what}: every pixel has the value {low}, so the images show nothing. Look at their source.")


def class_names_of(labels: Mapping[str, Tensor], given: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the name of each class, by default its number, and notes on classes without images.

    Args:
        labels: labels of each part by its name in messages, int64 [N], at least 0; the first part is for training.
        given: name of each class; then classes need not occur.

    Raises:
        UsageError: a part is empty, there is a single class, a number is left out and no names are given, a label has
            no name, or a part has labels that the training part lacks.
    """
    train, *others = labels
    if odd := next((name for name in given if not name.isprintable()), None):
        raise UsageError(f"the class name {ascii(odd)[:80]} has control characters. Rename the class.")
    for part, found in labels.items():
        if len(found) == 0:
            raise UsageError(f"{part}: there are no images")
    seen = labels[train].unique()
    known = {int(k) for k in seen}
    first, last = int(seen[0]), int(seen[-1])
    for part in labels:
        if given and int(labels[part].max()) >= len(given):
            raise UsageError(f"{part}: label {int(labels[part].max())} found, but only {len(given)} class names given")
    if not given and len(seen) < 2:
        raise UsageError(f"{train} holds a single class; at least 2 are needed")
    if not given and len(seen) <= last:
        if len(seen) == last - first + 1:
            raise UsageError(
                f"{train}: labels run from {first} to {last}, and there is no 0. Subtract {first} from every label."
            )
        missing = [str(k) for k in islice((k for k in range(last) if k not in known), _NAMED)]
        more = f" and {last + 1 - len(seen) - len(missing)} more" if last + 1 - len(seen) > len(missing) else ""
        raise UsageError(
            f"{train}: labels go up to {last}, but {', '.join(missing)}{more} never occur. "
            f"Number the classes 0 to {len(seen) - 1}, or give the name of every class (class_names)."
        )
    for part in others:
        strange = [k for k in labels[part].unique().tolist() if k not in known]
        if strange and not given:
            reach = f"goes to {last} only" if strange[-1] > last else "does not"
            raise UsageError(f"{part} holds the label {strange[-1]}, {train} {reach}")
    names = tuple(given) or tuple(str(k) for k in range(last + 1))
    notes = (
        _absence(part, [name for k, name in enumerate(names) if k not in present])
        for part, present in ((part, set(found.unique().tolist())) for part, found in labels.items())
    )
    return names, tuple(note for note in notes if note)


def _absence(part: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{part}: no image is of the class{'es' if len(names) > 1 else ''} {', '.join(names[:_NAMED])}{more}"


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.asarray(values)
        # torch takes neither the byte order of other machines nor negative strides, and warns of what is read-only.
        plain = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        return torch.from_numpy(plain.reshape(array.shape))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{what} must be numbers in an array of one shape ({reason})") from error


def _pixels(values: Any, what: str) -> Tensor:
    """Return the values as uint8, with dimensions in the same order."""
    pixels, wanted = _tensor(values, what), f"{what} must be uint8, or float in [0, 1]"
    if pixels.dtype == torch.uint8 or pixels.numel() == 0:
        return pixels.to(torch.uint8)
    if pixels.dtype == torch.bool:
        raise UsageError(f"{wanted}, got bool. Cast to uint8 and multiply by 255.")
    if pixels.is_complex():
        raise UsageError(f"{wanted}, got {_type(pixels)}")
    pixels = pixels if pixels.is_floating_point() else pixels.long()
    low, high = float(pixels.min()), float(pixels.max())
    if not math.isfinite(low + high):
        raise UsageError(f"{wanted}, got NaN or infinite values")
    span = f"got {_type(pixels)} from {low:.4g} to {high:.4g}"
    if not pixels.is_floating_point():
        raise UsageError(f"{wanted}, {span}.{' Cast to uint8.' if low >= 0 and high <= 255 else ''}")
    if low < 0 or high > 255:
        raise UsageError(f"{wanted}, {span}. Leave normalization to the model.")
    if high > 1:
        raise UsageError(f"{wanted}, {span}. Round and cast to uint8, or divide by 255.")
    return (pixels.float() * 255).round().to(torch.uint8)


def checked_labels(values: Any, what: str) -> Tensor:
    """Return labels as int64 [N].

    Args:
        values: integers [N] or [N, 1], at least 0.
        what: name of the labels in messages.

    Raises:
        UsageError: they are not.
    """
    labels = _tensor(values, what)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        raise UsageError(
            f"{what} must be one class an image, [N], got {_shape(labels)}. Take the argmax of one-hot labels."
        )
    if labels.ndim != 1:
        raise UsageError(f"{what} must be one class an image, [N], got {_shape(labels)}")
    if len(labels) == 0:
        return labels.long()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        lost = labels.is_floating_point() and not bool(labels.isfinite().all())
        raise UsageError(
            f"{what} must hold integers, got {_type(labels)}"
            + (" with NaN. Leave out images without a class." if lost else ". Cast them to int64.")
        )
    if labels.dtype == torch.uint64 and int(labels.view(torch.int64).min()) < 0:
        raise UsageError(f"{what} holds a label above 2^63. Number the classes from 0.")
    labels = labels.long()
    if int(labels.max()) >= _MOST_CLASSES:
        raise UsageError(
            f"{what} holds the label {int(labels.max())}; there can be {_MOST_CLASSES:,} classes. Number them from 0."
        )
    if int(labels.min()) < 0:
        raise UsageError(
            f"{what} holds the negative label {int(labels.min())}. "
            "Number classes from 0, and leave out images without one."
        )
    return labels


def _shape(values: Tensor) -> str:
    return str(tuple(values.shape))


def _type(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")
