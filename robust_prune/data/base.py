"""Images in memory or on disk behind one small interface, and the bundle of splits a run reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..shown import Shown


class ImageSet(Protocol):
    """Random access to labelled images."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (uint8, [N, C, H, W]) and labels (int64, [N]) at `indices` (int64, [N])."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Images held in memory: `images` uint8 [N, C, H, W], `labels` int64 [N]."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise UsageError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}")
        if len(self.images) != len(self.labels):
            raise UsageError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at `indices`."""
        return self.images[indices], self.labels[indices]

    def to(self, device: torch.device) -> TensorImages:
        """The same images on another device."""
        return TensorImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Subset:
    """Some images of another set, in the order of `indices` (int64, [N])."""

    base: ImageSet
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at positions `indices` of this subset."""
        return self.base.get(self.indices[indices])


def first(images: ImageSet, count: int | None) -> ImageSet:
    """The first `count` images (all of them for None or a larger count)."""
    if count is None or count >= len(images):
        return images
    return Subset(images, torch.arange(count))


def random_subset(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    """`count` images drawn without replacement under `seed` (all for None or a larger count)."""
    if count is None or count >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, order[:count].sort().values)


def random_images(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The images of `random_subset`, [N, C, H, W] in [0, 1], and their labels [N]."""
    return first_images(random_subset(images, count, seed), count)


def first_images(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images (all, if there are fewer), [N, C, H, W] in [0, 1], and their labels [N]."""
    x, y = images.get(torch.arange(min(count, len(images))))
    return x.float() / 255, y


def mixing_order(labels: Tensor) -> Tensor:
    """Positions [N] in which images should lie, so that the first of them are of all classes.

    As they are, unless they are sorted by class; then a fixed random order.
    """
    if len(labels) > 1 and bool((labels[1:] >= labels[:-1]).all()):
        return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.arange(len(labels))


def images_at_once(images: ImageSet, most: int = 256) -> int:
    """How many of `images` to attack at once, so that what a backward pass keeps fits into memory.

    `most`, and fewer above 64x64 pixels, in inverse proportion to the area, but 4 or more: a ResNet-50 at 224 pixels
    needs 0.1 GiB an image.
    """
    if len(images) == 0:
        return most
    height, width = images.get(torch.arange(1))[0].shape[-2:]
    return min(most, max(4, most * 64 * 64 // (height * width)))


def batches(images: ImageSet, batch_size: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """In order: float images in [0, 1] ([B, C, H, W]) and labels ([B]) on `device`."""
    for start in range(0, len(images), batch_size):
        x, y = images.get(torch.arange(start, min(start + batch_size, len(images))))
        yield x.to(device).float() / 255, y.to(device)


SAMPLE_NOTE = (
    "These figures come from the embedded sample of CIFAR-10 (a few hundred test images): they are indicative only."
)


@dataclass(frozen=True, repr=False)
class DataBundle(Shown):
    """The splits of one data set.

    Attributes:
        name: as the user named it, for reports.
        train: images for training, MRS and calibration.
        validation: held out of the training images, for selection; never trained on.
        test: for the final figures of a run only.
        class_names: one a class.
        mean: per channel, of [0, 1] images.
        std: standard deviation per channel, of [0, 1] images.
        input_size: channels, height and width of one image.
        sample: True for the embedded sample, whose figures are only indicative.
        notes: sentences that a report must show, such as how a missing split was made.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    sample: bool = False
    notes: tuple[str, ...] = ()

    def short(self) -> str:
        """Name, sizes and classes."""
        size = "x".join(map(str, self.input_size))
        return (
            f"{self.name}: {len(self.train):,} training, {len(self.validation):,} held-out and {len(self.test):,} test "
            f"images {size} of {self.num_classes} classes"
        )

    @property
    def cautions(self) -> tuple[str, ...]:
        """Sentences that must stand beside any figure of these images."""
        return ((SAMPLE_NOTE,) if self.sample else ()) + self.notes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def hold_out(bundle: DataBundle, count: int, seed: int = 0) -> DataBundle:
    """Slices `count` random training images off as the validation part (deterministic under `seed`).

    Raises:
        UsageError: fewer than `count` + 1 training images.
    """
    total = len(bundle.train)
    if count >= total:
        raise UsageError(f"cannot hold out {count} of {total} training images for validation. Lower data.validation.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return replace(
        bundle,
        train=Subset(bundle.train, order[count:].sort().values),
        validation=Subset(bundle.train, order[:count].sort().values),
    )
