"""Data sets by name or by path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EnvironmentProblem, UsageError
from ..suggest import did_you_mean
from .base import DataBundle, TensorImages, hold_out
from .class_names import BY_DATA
from .folder import load_folder
from .npz import channel_statistics, load_npz
from .sample import SAMPLE, load_sample

DEFAULT_VALIDATION_SHARE = 0.1
DEFAULT_VALIDATION_MAX = 1000
"""Largest number of images that are held out by default; the default is a tenth of the training images."""

ROOT_VARIABLE = "ROBUST_PRUNE_DATA"
_CIFAR_MEAN_STD = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def data_root() -> Path:
    """Return the folder of named data sets: ``ROBUST_PRUNE_DATA`` if it is set, else a folder in the user's cache."""
    named = os.environ.get(ROOT_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "robust-prune-data"


def load_data(
    name: str | Path,
    *,
    validation: int | None = None,
    root: Path | None = None,
    seed: int = 0,
    input_size: tuple[int, int, int] | None = None,
) -> DataBundle:
    """Open a data set and hold out some of its training images for validation.

    Args:
        name: ``cifar10``, ``cifar100``, ``svhn`` or ``fashion_mnist`` (by torchvision, downloaded if missing; a file
            ``<name>.npz`` in `root` has precedence), ``sample`` (embedded), or a path to an ``.npz`` file or a folder.
        validation: number of images to hold out, at least 1; by default a tenth, at most 1000. It is ignored if the
            data have a validation part, as the sample and folders with ``val/`` and ``test/`` do.
        root: folder of named data sets; by default `data_root`.
        seed: random seed of the splits.
        input_size: (channels, height, width) of the images of a folder; ignored for other sources.

    Raises:
        UsageError: the name is unknown, the path is wrong, or the data are malformed.
        EnvironmentProblem: the data set is not on this machine and cannot be downloaded, or a package is missing.
    """
    return held_out(_open(str(name), root or data_root(), seed, input_size), validation, seed)


def held_out(bundle: DataBundle, validation: int | None, seed: int = 0) -> DataBundle:
    """Return the bundle with held-out images: its own, or `validation` of its training images.

    Args:
        bundle: the data set.
        validation: number of images to hold out; by default a tenth, at most 1000.
        seed: random seed of the choice.

    Raises:
        UsageError: `validation` is below 1, or there are too few training images.
    """
    if len(bundle.validation):
        return bundle
    if validation is None:
        validation = max(1, min(DEFAULT_VALIDATION_MAX, int(DEFAULT_VALIDATION_SHARE * len(bundle.train))))
    if validation < 1:
        raise UsageError(f"data.validation must be at least 1 image, got {validation}: models are selected on them")
    return hold_out(bundle, validation, seed)


def _open(name: str, root: Path, seed: int, input_size: tuple[int, int, int] | None) -> DataBundle:
    if name == SAMPLE:
        return load_sample()
    if name in _TORCHVISION:
        prepared = root / f"{name}.npz"
        if prepared.is_file():
            bundle = replace(load_npz(prepared, BY_DATA[name]), name=name)
        else:
            bundle = _torchvision(name, root)
        if name == "cifar10":
            mean, std = _CIFAR_MEAN_STD
            bundle = replace(bundle, mean=mean, std=std)
        return bundle
    path = Path(name).expanduser()
    if path.is_dir():
        return load_folder(path, input_size=input_size, seed=seed)
    if path.is_file() and path.suffix != ".npz":
        raise UsageError(f"data {name} is a {path.suffix or 'nameless'} file. Give an .npz, a folder or a known name.")
    if not path.exists():
        known = [SAMPLE, *_TORCHVISION]
        raise UsageError(
            f"no data at {name!r}.{did_you_mean(name, known)} "
            f"Give {', '.join(known)}, a path to an .npz or a folder of images."
        )
    return load_npz(path)


def _torchvision(name: str, root: Path) -> DataBundle:
    make = _TORCHVISION[name]
    try:
        train, test = make(root, True), make(root, False)
    except ImportError as error:
        raise EnvironmentProblem(f"reading {name} needs the package {error.name}: pip install {error.name}") from error
    except (OSError, RuntimeError, EOFError) as error:  # torchvision's downloads fail with any of these
        reason = " ".join(str(error).split())[:160]
        raise EnvironmentProblem(
            f"{name} is not in {root} and cannot be downloaded ({reason}). Connect to the internet once, "
            f"or put torchvision's files or {name}.npz (x_train, y_train, x_test, y_test) there, or name another "
            f"folder in {ROOT_VARIABLE}."
        ) from error
    mean, std = channel_statistics(train.images)
    channels, height, width = train.images.shape[1:]
    empty = TensorImages(train.images[:0], train.labels[:0])
    return DataBundle(name, train, empty, test, BY_DATA[name], mean, std, (channels, height, width))


def _cifar(kind: str) -> Callable[[Path, bool], TensorImages]:
    def make(root: Path, train: bool) -> TensorImages:
        from torchvision import datasets

        data = getattr(datasets, kind)(root, train=train, download=True)
        return _tensors(data.data.transpose(0, 3, 1, 2), data.targets)

    return make


def _svhn(root: Path, train: bool) -> TensorImages:
    import scipy.io  # noqa: F401  (torchvision imports it only after the download)
    from torchvision import datasets

    data = datasets.SVHN(root, split="train" if train else "test", download=True)
    return _tensors(data.data, data.labels)


def _fashion_mnist(root: Path, train: bool) -> TensorImages:
    from torchvision import datasets

    data = datasets.FashionMNIST(root, train=train, download=True)
    return _tensors(data.data.numpy()[:, None], data.targets)


def _tensors(images: np.ndarray, labels: Any) -> TensorImages:
    return TensorImages(torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(np.asarray(labels)).long())


_TORCHVISION: dict[str, Callable[[Path, bool], TensorImages]] = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "svhn": _svhn,
    "fashion_mnist": _fashion_mnist,
}
