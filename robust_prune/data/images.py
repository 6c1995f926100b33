"""Images in files: what they say of themselves, and their pixels."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from ..errors import UsageError

# Pillow refuses images of twice its limit; between the two it only warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

DEFAULT_SIDE = 224
"""Height and width in pixels of resized images, if sizes differ and the caller names none."""
REDUCING_GAP = 4
"""JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where this many times the sides that are needed are left."""
GREY_DIMENSIONS = 2
LOOKED_AT = 2000
"""Largest number of images whose size and colours are read before the others are decoded in the same form."""

Source: TypeAlias = Path | bytes
"""A file of an image, or what is in it."""
Size: TypeAlias = tuple[int, int, int]
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_WAITING = 4096
"""Number of images that are handed to the threads at once."""
_GREY = frozenset({"1", "L", "LA", "La", "I", "F"})
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Formats that Pillow decodes itself; for others, such as PostScript, it starts programs."""
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})


@dataclass(frozen=True)
class Form:
    """What decoded images look like.

    Attributes:
        size: (channels, height, width); one channel is greyscale, three are colour. Images of another size are resized
            to cover it and centre-cropped.
        fraction: share of the sides of the centre crop that is kept, in (0, 1]. At 0.875 and 224x224, which is usual
            for ImageNet, images are resized to cover 256x256 first.
    """

    size: Size
    fraction: float = 1.0


def decode_all(sources: Sequence[Source], names: Sequence[str], form: Form) -> Tensor:
    """Return images as uint8 [N, C, H, W] of one form, decoded by a pool of threads.

    Raises:
        UsageError: an image cannot be decoded; the message has its name.
    """
    pairs = list(zip(sources, names, strict=True))
    arrays = list(in_threads(lambda pair: decode(pair[0], pair[1], form), pairs))
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0, *form.size, dtype=torch.uint8)


def decode_whole(sources: Sequence[Source], names: Sequence[str], channels: int) -> list[Tensor]:
    """Return images as they are stored, each uint8 [C, H, W] of its own size, decoded by a pool of threads.

    Raises:
        UsageError: an image cannot be decoded; the message has its name.
    """
    pairs = list(zip(sources, names, strict=True))
    return [
        torch.from_numpy(_array(found).copy()) for found in in_threads(lambda pair: _pixels(*pair, channels), pairs)
    ]


def decode(source: Source, name: str, form: Form) -> np.ndarray:
    """Return one image as uint8 [C, H, W] of the form.

    Raises:
        UsageError: the image cannot be decoded.
    """
    channels, height, width = form.size
    needed = math.ceil(height / form.fraction), math.ceil(width / form.fraction)
    image = _pixels(source, name, channels, needed)
    if image.size != (width, height) or form.fraction < 1:
        image = _resized(image, height, width, form.fraction)
    return _array(image)


def _pixels(source: Source, name: str, channels: int, needed: tuple[int, int] | None = None) -> Image.Image:
    """Return an image in grey or in colour; JPEG files far larger than `needed` (height, width) are decoded smaller."""
    try:
        with _opened(source) as stream:
            if needed is not None:
                stream.draft(None, (REDUCING_GAP * needed[1], REDUCING_GAP * needed[0]))
            return _eight_bits(stream).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise _undecodable(name, error) from error


def _array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == GREY_DIMENSIONS else np.ascontiguousarray(array.transpose(2, 0, 1))


def common_form(
    count: int, source: Callable[[int], tuple[Source, str]], image_size: tuple[int, int] | None, seed: int
) -> tuple[Size, tuple[str, ...]]:
    """Return the (channels, height, width) in which images are decoded, and notes on what this changes.

    Images are grey if all are, else colour. The headers of up to `LOOKED_AT` random ones are read.

    Args:
        count: number of images.
        source: maps a number below `count` to the image and its name in messages.
        image_size: (height, width); by default that of the images if all are equal, else 224x224.
        seed: random seed of the choice.

    Raises:
        UsageError: an image cannot be read.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:LOOKED_AT].tolist()
    seen = list(in_threads(lambda i: _header(*source(i)), order))
    sizes, grey, alpha = {size for size, _, _ in seen}, sum(g for _, g, _ in seen), sum(a for _, _, a in seen)
    notes, of = [], f"of {len(seen):,} images{' looked at' if len(seen) < count else ''}"
    if grey and grey < len(seen):
        notes.append(f"{grey:,} {of} are grey and the others coloured: all are read as colour images")
    if alpha:
        notes.append(f"{alpha:,} {of} are partly transparent: their alpha channel is dropped")
    if image_size is None and len(sizes) == 1:
        width, height = sizes.pop()
        image_size = height, width
    elif image_size is None:
        image_size = DEFAULT_SIDE, DEFAULT_SIDE
        notes.append(f"images differ in size: each is resized and centre-cropped to {DEFAULT_SIDE}x{DEFAULT_SIDE}")
    return (1 if grey == len(seen) else 3, *image_size), tuple(notes)


def in_threads(function: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """Yield what `function`, which reads or decodes, returns for each of the items, in their order.

    A worker of a data loader has no threads: its siblings work beside it, and those of its parent did not come along.
    """
    if get_worker_info() is not None:
        yield from map(function, items)
        return
    for start in range(0, len(items), _WAITING):
        yield from _pool().map(function, items[start : start + _WAITING])


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def _opened(source: Source) -> Image.Image:
    if isinstance(source, Path) and not source.is_file():
        raise ValueError("it is missing, or no file")
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS)


def _header(source: Source, name: str) -> tuple[tuple[int, int], bool, bool]:
    """Return (width, height), whether the image is grey, and whether parts of it are transparent."""
    try:
        with _opened(source) as image:
            grey = image.mode in _GREY or image.mode.startswith("I;16")
            return image.size, grey, image.mode in _ALPHA or "transparency" in image.info
    except Exception as error:  # as in `decode`
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(f"cannot decode the image {name}: {reason}. Remove or replace it.")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits, since Pillow clips it at 255.

    Raises:
        ValueError: the image has 32 bits, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has 32 bits a pixel, whose range is not known; store it with 8 or 16 bits")
    return image


def _resized(image: Image.Image, height: int, width: int, fraction: float) -> Image.Image:
    # Cropped first, so that a narrow image does not become a huge one on the way.
    scale = fraction * min(image.width / width, image.height / height)
    kept = (width * scale, height * scale)
    # Rounded, the product may exceed the side from which the scale was computed.
    left, top = max(0.0, (image.width - kept[0]) / 2), max(0.0, (image.height - kept[1]) / 2)
    box = (left, top, min(image.width, left + kept[0]), min(image.height, top + kept[1]))
    return image.resize((width, height), Image.Resampling.BICUBIC, box)
