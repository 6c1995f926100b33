"""Interface of image sets in memory or on disk, and the bundle of splits of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..shown import Shown


class ImageSet(Protocol):
    """Interface of labelled images with random access."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8 [N, C, H, W]) and labels (int64 [N]) at `indices` (int64 [N])."""
        ...


@dataclass(frozen=True)
class TensorImages:
    """Images in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].

    Raises:
        UsageError: the images have another type or shape, or the number of labels differs.
    """

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
        """Return images (uint8 [N, C, H, W]) and labels (int64 [N]) at `indices`."""
        return self.images[indices], self.labels[indices]

    def to(self, device: torch.device) -> TensorImages:
        """Return the images on another device."""
        return TensorImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Subset:
    """Images of another set at `indices` (int64 [N]), in this order."""

    base: ImageSet
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8 [N, C, H, W]) and labels (int64 [N]) at positions `indices` of this subset."""
        return self.base.get(self.indices[indices])


def first(images: ImageSet, count: int | None) -> ImageSet:
    """Return the first `count` images; all of them for None or a larger count."""
    if count is None or count >= len(images):
        return images
    return Subset(images, torch.arange(count))


def random_subset(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    """Return `count` random images, drawn without replacement; all of them for None or a larger count."""
    if count is None or count >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, order[:count].sort().values)


def random_images(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the images of `random_subset` as float [N, C, H, W] in [0, 1], and their labels [N]."""
    return first_images(random_subset(images, count, seed), count)


def first_images(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` images, or all if there are fewer, as float [N, C, H, W] in [0, 1], and labels [N]."""
    x, y = images.get(torch.arange(min(count, len(images))))
    return x.float() / 255, y


def mixing_order(labels: Tensor) -> Tensor:
    """Return an order of images, int64 [N], such that the first images belong to all classes.

    It is a fixed random permutation if the labels are sorted, else the identity.
    """
    if len(labels) > 1 and bool((labels[1:] >= labels[:-1]).all()):
        return torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.arange(len(labels))


def images_at_once(images: ImageSet, most: int = 256) -> int:
    """Return the batch size of attacks, such that the activations of a backward pass fit into memory.

    It is `most` up to 64x64 pixels and decreases in inverse proportion to the area above, but is at least 4: a
    ResNet-50 at 224 pixels needs 0.1 GiB for each image.
    """
    if len(images) == 0:
        return most
    height, width = images.get(torch.arange(1))[0].shape[-2:]
    return min(most, max(4, most * 64 * 64 // (height * width)))


def batches(images: ImageSet, batch_size: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images in order as float [B, C, H, W] in [0, 1], and labels [B], on `device`."""
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
        name: name of the data set in reports.
        train: images for training, MRS and calibration.
        validation: held-out training images for model selection; never used for training.
        test: images for the final results of a run only.
        class_names: name of each class.
        mean: mean of each channel of [0, 1] images.
        std: standard deviation of each channel of [0, 1] images.
        input_size: (channels, height, width) of the images.
        sample: whether this is the embedded sample, whose results are only indicative.
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
        """Return one sentence: name, number of images in each split, their size and the number of classes."""
        size = "x".join(map(str, self.input_size))
        return (
            f"{self.name}: {len(self.train):,} training, {len(self.validation):,} held-out and {len(self.test):,} test "
            f"images {size} of {self.num_classes} classes"
        )

    @property
    def cautions(self) -> tuple[str, ...]:
        """Sentences that must accompany any result on these images."""
        return ((SAMPLE_NOTE,) if self.sample else ()) + self.notes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def hold_out(bundle: DataBundle, count: int, seed: int = 0) -> DataBundle:
    """Return the bundle with `count` random training images moved to the validation part; deterministic for a seed.

    Raises:
        UsageError: there are fewer than `count` + 1 training images.
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
