"""The embedded sample: 2,000 training and 500 test images of CIFAR-10, compressed without loss.

`encode` (whose inverse is `decode`) converts colours to green, red - green and blue - green, all modulo 256. Each plane
is predicted from the left, upper and upper-left neighbours by the median edge detector of LOCO-I (Weinberger, Seroussi
and Sapiro, 2000), and the residuals, again modulo 256, are compressed by LZMA. The result has about 54 % of the raw
size; PNG has 70 %.
"""

from __future__ import annotations

import io
import lzma
from importlib import resources

import numpy as np
import torch

from ..errors import EnvironmentProblem
from .base import DataBundle, Subset, TensorImages
from .class_names import CIFAR10

SAMPLE = "sample"
FILE = "cifar10_sample.npz"
VALIDATION = 200
"""Number of training images that `load_sample` holds out, equal for each class."""

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Mean and standard deviation of each channel over all 50,000 training images, in [0, 1]."""


def load_sample() -> DataBundle:
    """Return the embedded sample; its validation part is every tenth training image of each class.

    Raises:
        EnvironmentProblem: the file is damaged or missing from the installation.
    """
    arrays = read_arrays()
    train = TensorImages(_nchw(arrays["x_train"]), torch.from_numpy(arrays["y_train"].astype(np.int64)))
    test = TensorImages(_nchw(arrays["x_test"]), torch.from_numpy(arrays["y_test"].astype(np.int64)))
    held = torch.zeros(len(train), dtype=torch.bool)
    step = len(train) // VALIDATION
    for label in range(len(CIFAR10)):
        held[(train.labels == label).nonzero().flatten()[::step]] = True
    return DataBundle(
        name="sample of CIFAR-10",
        train=Subset(train, (~held).nonzero().flatten()),
        validation=Subset(train, held.nonzero().flatten()),
        test=test,
        class_names=CIFAR10,
        mean=MEAN,
        std=STD,
        input_size=(3, 32, 32),
        sample=True,
    )


def read_arrays() -> dict[str, np.ndarray]:
    """Return the stored arrays by name.

    ``x_train`` and ``x_test`` are uint8 [N, H, W, C], ``y_*`` the labels (uint8), ``index_*`` positions in CIFAR-10.

    Raises:
        EnvironmentProblem: the file is damaged or missing from the installation.
    """
    resource = resources.files("robust_prune") / "data" / "sample" / FILE
    try:
        with np.load(io.BytesIO(resource.read_bytes()), allow_pickle=False) as data:
            stored = {key: data[key] for key in data.files}
        for part in ("train", "test"):
            stored[f"x_{part}"] = decode(stored.pop(f"coded_{part}").tobytes(), len(stored[f"y_{part}"]))
    except (OSError, ValueError, KeyError, lzma.LZMAError) as error:
        raise EnvironmentProblem(f"the embedded sample cannot be read ({error}). Reinstall robust-prune.") from error
    return stored


def encode(images: np.ndarray) -> bytes:
    """Return images (uint8 [N, H, W, 3]) as bytes, compressed without loss; see the module docstring."""
    planes = _decorrelated(images)
    left, up, corner = np.zeros_like(planes), np.zeros_like(planes), np.zeros_like(planes)
    left[:, :, :, 1:] = planes[:, :, :, :-1]
    up[:, :, 1:] = planes[:, :, :-1]
    corner[:, :, 1:, 1:] = planes[:, :, :-1, :-1]
    left[:, :, 1:, 0] = corner[:, :, 1:, 0] = up[:, :, 1:, 0]
    up[:, :, 0] = corner[:, :, 0] = left[:, :, 0]
    residuals = (planes - _median_edge(left, up, corner)).astype(np.uint8)
    return lzma.compress(residuals.tobytes(), preset=6 | lzma.PRESET_EXTREME)


def decode(coded: bytes, count: int, side: int = 32) -> np.ndarray:
    """Return the images (uint8 [count, side, side, 3]) that `encode` compressed.

    Raises:
        ValueError: the data are not those of `count` images.
    """
    flat = np.frombuffer(lzma.decompress(coded), np.uint8)
    residuals = flat.reshape(3, count, side, side).transpose(2, 3, 0, 1).astype(np.int16)
    planes = np.zeros_like(residuals)
    for row in range(side):
        for column in range(side):
            left = planes[row, column - 1] if column else planes[row - 1, column] if row else planes[0, 0]
            up = planes[row - 1, column] if row else left
            corner = planes[row - 1, column - 1] if row and column else up
            planes[row, column] = _wrapped(residuals[row, column] + _median_edge(left, up, corner))
    planes = planes.transpose(2, 3, 0, 1)
    green = planes[0]
    colours = np.stack([planes[1] + green, green, planes[2] + green], axis=-1)
    return colours.astype(np.uint8)


def _decorrelated(images: np.ndarray) -> np.ndarray:
    """Return green, red - green and blue - green, int16 [3, N, H, W], each wrapped to -128..127."""
    red, green, blue = (images[..., channel].astype(np.int16) for channel in range(3))
    return _wrapped(np.stack([green, red - green, blue - green]))


def _wrapped(values: np.ndarray) -> np.ndarray:
    return ((values + 128) & 255) - 128


def _median_edge(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    low, high = np.minimum(left, up), np.maximum(left, up)
    return np.where(corner >= high, low, np.where(corner <= low, high, left + up - corner))


def _nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
