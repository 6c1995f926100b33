"""Parts of a data set that share no image: what is refused, and how parts are made that a source lacks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from .base import DataBundle, ImageSet, Subset, TensorImages
from .images import in_threads

DEFAULT_VALIDATION_SHARE = 0.1
DEFAULT_VALIDATION_MAX = 1000
"""Largest number of images that are held out by default; the default is a tenth of the training images."""
TEST_SHARE = 0.2
"""Share in [0, 1] of each class that becomes the test part if a source has none."""
_HEAD = 4096


def finished(bundle: DataBundle, validation: int | None, seed: int = 0, published: bool = False) -> DataBundle:
    """Return the bundle with held-out images: its own, or `validation` of its training images.

    Equal images are held out together, so there may be more of them than asked for. They are equal if their pixels are,
    or for images on disk the bytes of their files.

    Args:
        bundle: the data set.
        validation: number of images to hold out; by default a tenth, at most 1000.
        seed: random seed of the choice.
        published: whether the splits are a published data set's, which nobody is to change: equal images in training
            and test part are then noted.

    Raises:
        UsageError: a part is empty, `validation` is below 1, there are too few training images, or test images are in
            the training or validation part as well.
    """
    for part, images in (("training", bundle.train), ("test", bundle.test)):
        if len(images) == 0:
            raise UsageError(f"{bundle.name} has no {part} images")
    parts = (bundle.train, bundle.validation, bundle.test)
    train, held, test = _numbered([keys_of(images) for images in parts])
    notes = [_copies(bundle, "training", bundle.train, train, test, published)]
    if len(bundle.validation):
        notes.append(_copies(bundle, "validation", bundle.validation, held, test, published))
        both = 0 if held is None or train is None else int(torch.isin(held, train).sum())
        notes.append(f"{both:,} validation images are training images as well" if both else "")
    bundle = replace(bundle, notes=(*bundle.notes, *(note for note in notes if note)))
    if len(bundle.validation):
        return bundle
    if validation is None:
        validation = max(1, min(DEFAULT_VALIDATION_MAX, int(DEFAULT_VALIDATION_SHARE * len(bundle.train))))
    if validation < 1:
        raise UsageError(f"data.validation must be at least 1 image, got {validation}: models are selected on them")
    return _hold_out(bundle, validation, seed, train)


def split_off(labels: Tensor, keys: Sequence[Hashable], seed: int) -> Tensor:
    """Return which images become the test part, bool [N]: a random fifth of each class, equal images together.

    A class without two different images stays in the training part.

    Args:
        labels: int64 [N].
        keys: a value for each image that equal images share.
        seed: random seed of the choice.
    """
    same = _numbered([keys])[0]
    assert same is not None
    generator = torch.Generator().manual_seed(seed)
    taken = torch.zeros(int(same.max()) + 1, dtype=torch.bool)
    for label in labels.unique().tolist():
        of_class = same[labels == label]
        copies = Counter(of_class.tolist())
        missing = max(1, round(TEST_SHARE * len(of_class))) - int(taken[of_class].sum())
        staying = len(copies) - int(taken[list(copies)].sum())
        for image in of_class[torch.randperm(len(of_class), generator=generator)].tolist():
            if missing <= 0 or staying <= 1:
                break
            if not taken[image]:
                taken[image] = True
                missing, staying = missing - copies[image], staying - 1
    return taken[same]


def keys_of(images: ImageSet) -> Sequence[Hashable] | None:
    """Return a value for each image that equal images share; None for sets of other kinds, which are not compared."""
    if isinstance(images, TensorImages):
        rows = images.images.cpu().contiguous().flatten(1).numpy()
        return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
    if isinstance(images, Subset):
        keys = keys_of(images.base)
        return None if keys is None else [keys[i] for i in images.indices.tolist()]
    keys = getattr(images, "keys", None)
    return keys if keys is not None and len(keys) == len(images) else None


def file_keys(paths: Sequence[Path]) -> list[Hashable]:
    """Return a value for each file that files of equal contents share.

    Only files of equal size are read: their beginning, and the whole of those that begin alike.

    Raises:
        OSError: a file cannot be read.
    """
    keys: list[Hashable] = [path.stat().st_size for path in paths]
    for read in (_beginning, _whole):
        count = Counter(keys)
        open_still = [i for i, key in enumerate(keys) if count[key] > 1]
        found = in_threads(read, [paths[i] for i in open_still])
        for i, more in zip(open_still, found, strict=True):
            keys[i] = (keys[i], more)
    return keys


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.blake2b(stream.read(_HEAD), digest_size=16).digest()


def _whole(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def _numbered(parts: Sequence[Sequence[Hashable] | None]) -> list[Tensor | None]:
    """Return a number for each image, int64 [N], that is the same for equal keys in all parts."""
    numbers: dict[Hashable, int] = {}
    return [
        None if keys is None else torch.tensor([numbers.setdefault(k, len(numbers)) for k in keys], dtype=torch.int64)
        for keys in parts
    ]


def _copies(
    bundle: DataBundle, part: str, images: ImageSet, numbers: Tensor | None, test: Tensor | None, published: bool
) -> str:
    """Return a note on test images of a published data set that are in another part too; refuse them elsewhere."""
    if numbers is None or test is None:
        return ""
    both = torch.isin(test, numbers).nonzero().flatten()
    if len(both) == 0:
        return ""
    verb = "is an image" if len(both) == 1 else "are images"
    many = f"{len(both):,} of {len(test):,} test images {verb} of the {part} part as well"
    if published:
        return f"{many}, as {bundle.name} was published"
    one = int(both[0])
    other = int((numbers == test[one]).nonzero()[0])
    raise UsageError(
        f"{bundle.name}: {many}, such as {_name(bundle.test, one)} and {_name(images, other)}. "
        "Results on images that are known say nothing about others: remove them from one of the two."
    )


def _name(images: ImageSet, position: int) -> str:
    name_of = getattr(images, "name_of", None)
    return f"number {position}" if name_of is None else str(name_of(position))


def _hold_out(bundle: DataBundle, count: int, seed: int, same: Tensor | None) -> DataBundle:
    total = len(bundle.train)
    if count >= total:
        raise UsageError(f"cannot hold out {count} of {total} training images for validation. Lower data.validation.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    same = torch.arange(total) if same is None else same
    copies, taken = same.bincount(), torch.zeros(int(same.max()) + 1, dtype=torch.bool)
    missing = count
    for image in same[order].tolist():
        if missing <= 0:
            break
        if not taken[image]:
            taken[image] = True
            missing -= int(copies[image])
    held = taken[same]
    if bool(held.all()):
        raise UsageError(
            f"cannot hold out {count} of {total} training images for validation: only {len(same.unique())} of them are "
            "different, and equal ones stay together. Lower data.validation, or give more images."
        )
    return replace(
        bundle,
        train=Subset(bundle.train, (~held).nonzero().flatten()),
        validation=Subset(bundle.train, held.nonzero().flatten()),
    )
