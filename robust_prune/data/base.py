"""Interface of image sets in memory or on disk, and the bundle of splits of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..shown import Shown


class ImageSet(Protocol):
    """Interface of labelled images with random access.

    A set should also have an attribute ``labels``, int64 [N], that needs no decoding; see `labels_of`. A set whose
    images are stored larger may have a method ``originals``; see `originals`.
    """

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
        images: uint8 [N, C, H, W], contiguous.
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
        object.__setattr__(self, "images", plain_strides(self.images))

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

    @property
    def labels(self) -> Tensor:
        """Labels, int64 [N]."""
        return labels_of(self.base)[self.indices]

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8 [N, C, H, W]) and labels (int64 [N]) at positions `indices` of this subset."""
        return self.base.get(self.indices[indices])


def originals(images: ImageSet, indices: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return images as they are stored, each uint8 [C, H, W] of its own size, and labels (int64 [N]) at `indices`.

    Sets without a method ``originals`` give the images of `ImageSet.get`.
    """
    if isinstance(images, Subset):
        return originals(images.base, images.indices[indices])
    own = getattr(images, "originals", None)
    if own is not None:
        found: tuple[list[Tensor], Tensor] = own(indices)
        return found
    x, y = images.get(indices)
    return list(x), y


def labels_of(images: ImageSet) -> Tensor:
    """Return the labels of a set, int64 [N] on the CPU; images are read only if the set has no attribute ``labels``."""
    known = getattr(images, "labels", None)
    if known is None:
        parts = [images.get(part)[1] for part in torch.arange(len(images)).split(_LABELS_AT_ONCE) if len(part)]
        known = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    return torch.as_tensor(known).cpu()


def stratified_order(labels: Tensor, seed: int = 0) -> Tensor:
    """Return an order of images, int64 [N], of which every beginning has nearly the class shares of the whole.

    If all classes are equally large, the numbers of their images in a beginning differ by at most one.

    Args:
        labels: int64 [N].
        seed: random seed of the order within classes and of the turns of classes.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    _, of_class, counts = labels.cpu()[order].unique(return_inverse=True, return_counts=True)
    grouped = of_class.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[grouped] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[of_class[grouped]]
    # Each class is spread evenly over [0, 1), from a random start, or small classes would all have the same turn.
    start = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    return order[((rank + start[of_class]) / counts[of_class]).argsort(stable=True)]


def stratified(images: ImageSet, count: int | None, seed: int = 0) -> ImageSet:
    """Return `count` images with the class shares of the set; the set itself for None or a larger count.

    The same images are chosen whenever the seed is the same, and a smaller sample is part of a larger one. Results are
    to be compared, so the seed of a recipe does not change which images are judged.
    """
    if count is None or count >= len(images):
        return images
    return Subset(images, stratified_order(labels_of(images), seed)[:count])


def stratified_images(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Return the images of `stratified` as float [N, C, H, W] in [0, 1], and their labels [N]."""
    return _all_of(stratified(images, count))


def random_subset(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    """Return `count` random images, drawn without replacement; all of them for None or a larger count."""
    if count is None or count >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, order[:count].sort().values)


def random_images(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the images of `random_subset` as float [N, C, H, W] in [0, 1], and their labels [N]."""
    return _all_of(random_subset(images, count, seed))


def _all_of(images: ImageSet) -> tuple[Tensor, Tensor]:
    x, y = images.get(torch.arange(len(images)))
    return as_floats(x), y


def plain_strides(images: Tensor) -> Tensor:
    """Return images [N, C, H, W] in contiguous layout with the strides that belong to it.

    Of a single channel, channels_last images count as contiguous too, but convolutions answer them in channels_last,
    on which models that call ``view`` fail.
    """
    return images.contiguous().view(images.shape)


def as_floats(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return uint8 images [N, C, H, W] as float in [0, 1] on `device`, in contiguous layout."""
    return plain_strides(images.to(device)).float() / 255


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
        yield as_floats(x, device), y.to(device)


_LABELS_AT_ONCE = 256
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
