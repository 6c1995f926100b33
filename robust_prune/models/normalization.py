"""Normalization inside the model, so that its inputs are images in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.base import DataBundle
from ..data.sample import MEAN as CIFAR10_MEAN
from ..data.sample import STD as CIFAR10_STD
from ..errors import UsageError

AUTO = "auto"
FORMS = "auto, none, data, imagenet, or MEAN/STD such as 0.5/0.5 or 0.49,0.48,0.45/0.25,0.24,0.26"

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIMILAR_MEAN, _SIMILAR_STD = 0.06, 0.25
_SAMPLING_MEAN, _SAMPLING_STD = 0.02, 0.05
_NOISE_MEAN, _NOISE_STD = 0.3, 0.5


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel of [0, 1] images, under a name.

    Attributes:
        name: ``none``, ``data``, ``imagenet``, ``0-255``, or the numbers as ``MEAN/STD``.
        mean: mean of each channel, subtracted first.
        std: standard deviation of each channel, by which the difference is divided; above 0.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Return [0, 1] images [N, C, H, W] after normalization."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def undo(self, images: Tensor) -> Tensor:
        """Return images [N, C, H, W] from which `__call__` makes the given ones."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return images * std + mean

    def __str__(self) -> str:
        if self.name in ("none", "0-255"):
            return self.name
        values = "/".join(",".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return self.name if self.name == values else f"{self.name} ({values})"

    def similar(self, other: Normalization, mean: float = _SIMILAR_MEAN, std: float = _SIMILAR_STD) -> bool:
        """Return whether means differ by less than `mean` and deviations by less than `std` of the smaller one.

        By default these are limits below which networks can hardly tell the difference, as between the statistics of
        CIFAR-10 and those of ImageNet.
        """
        means = max(abs(a - b) for a, b in zip(self.mean, other.mean, strict=True))
        ratios = max(max(a / b, b / a) for a, b in zip(self.std, other.std, strict=True))
        return means < mean and ratios < 1 + std


def no_normalization(channels: int) -> Normalization:
    """Return the normalization that leaves [0, 1] images as they are."""
    return Normalization("none", (0.0,) * channels, (1.0,) * channels)


def common_normalizations(data: DataBundle) -> tuple[Normalization, ...]:
    """Return the normalizations that published models of such images use; the data's own statistics are the second."""
    none, *others = published_normalizations(data.input_size[0])
    return none, _of_data(data), *others


def published_normalizations(channels: int) -> tuple[Normalization, ...]:
    """Return the normalizations that published models use whatever their data; the first one is none."""
    imagenet = (Normalization("imagenet", *_IMAGENET),) if channels == len(_IMAGENET[0]) else ()
    half = Normalization("0.5/0.5", (0.5,) * channels, (0.5,) * channels)
    return no_normalization(channels), *imagenet, half, Normalization("0-255", (0.0,) * channels, (1 / 255,) * channels)


def _of_data(data: DataBundle) -> Normalization:
    """Return the data's statistics; those of a part of CIFAR-10 become those of the whole, which weights were made for.

    Otherwise the same weights would compute something else beside another file of the same images.
    """
    found = Normalization("data", data.mean, data.std)
    published = Normalization("data", CIFAR10_MEAN, CIFAR10_STD)
    if data.input_size[0] != len(CIFAR10_MEAN):
        return found
    noise = len(data.train) ** -0.5 if len(data.train) else 0.0  # of the statistics of few images
    near = max(_SAMPLING_MEAN, _NOISE_MEAN * noise), max(_SAMPLING_STD, _NOISE_STD * noise)
    return published if found.similar(published, *near) else found


def parse(text: str, data: DataBundle) -> Normalization | None:
    """Return the normalization that `text` names for images of `data`; None for ``auto``.

    Args:
        text: ``auto``, ``none``, ``data``, ``imagenet``, or ``MEAN/STD``, each one number or one for each channel.
        data: data set, with the number of channels and the statistics.

    Raises:
        UsageError: the form is another one, or the numbers do not fit the channels of the images.
    """
    if not isinstance(text, str):
        raise UsageError(f"normalization is a text, {FORMS}; got {type(text).__name__}")
    if text == AUTO:
        return None
    channels = data.input_size[0]
    known = {found.name: found for found in common_normalizations(data)}
    if text in known:
        return known[text]
    if text == "imagenet":
        raise UsageError(f"normalization imagenet is for 3 channels, the images of {data.name} have {channels}.")
    mean, std = numbers(text)
    mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    if len(mean) != channels or len(std) != channels:
        raise UsageError(
            f"normalization {text!r} has {len(mean)} means and {len(std)} deviations for {channels} channels. Give "
            "one of each, or one for each channel."
        )
    return Normalization(text, mean, std)


def numbers(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the means and deviations of ``MEAN/STD``.

    Raises:
        UsageError: the text has another form, or a number is not finite or out of range.
    """
    mean_text, _, std_text = text.partition("/")
    try:
        mean, std = (tuple(float(part) for part in side.split(",")) for side in (mean_text, std_text))
    except ValueError as error:
        raise UsageError(f"normalization is {FORMS}; got {text!r}") from error
    if not all(-1 <= value <= 1 for value in mean) or not all(0 < value <= 10 for value in std):
        hint = " Values of 0 to 255 are divided by 255." if max(mean) > 1 else ""
        raise UsageError(f"normalization needs means in [-1, 1] and deviations in (0, 10], got {text!r}.{hint}")
    return mean, std


class NormalizedClassifier(nn.Module):
    """Classifier of [0, 1] images that normalizes each channel and then runs `backbone`.

    Args:
        backbone: maps normalized images [N, C, H, W] to logits [N, K].
        mean, std: mean and standard deviation of each channel of [0, 1] images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        # Not saved with the weights, so that a checkpoint cannot silently override the statistics in the manifest.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images [N, C, H, W] in [0, 1]."""
        return self.backbone((images - self.mean) / self.std)
