"""Data sets by name or by path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EnvironmentProblem, UsageError
from ..suggest import did_you_mean
from . import hugging_face
from .base import DataBundle, TensorImages
from .bundles import in_memory
from .class_names import BY_DATA
from .folder import ClassOrder, is_tiny_imagenet, load_folder
from .npz import load_npz
from .sample import SAMPLE, load_sample
from .splits import finished

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
    image_size: int | tuple[int, int] | None = None,
    crop_fraction: float = 1.0,
    class_order: ClassOrder = "text",
) -> DataBundle:
    """Open a data set and hold out some of its training images for validation.

    Args:
        name: ``cifar10``, ``cifar100``, ``svhn`` or ``fashion_mnist`` (by torchvision, downloaded if missing; a file
            ``<name>.npz`` in `root` has precedence), ``sample`` (embedded), or a path to an ``.npz`` file, a folder of
            images, or a Hugging Face data set: a ``.parquet`` file, a shard of WebDataset (``.tar``), a folder of
            them, or what ``save_to_disk`` wrote.
        validation: number of images to hold out, at least 1; by default a tenth, at most 1000. It is ignored if the
            data have a validation part, as the sample and folders with ``val/`` and ``test/`` do.
        root: folder of named data sets; by default `data_root`.
        seed: random seed of the splits.
        image_size: side, or (height, width), to which images of a folder or a Hugging Face data set are resized.
        crop_fraction: share of the sides of the centre crop that is kept of these images, in (0, 1]; see `images.Form`.
        class_order: how the classes of a folder are numbered; see `load_folder`.

    Raises:
        UsageError: a value is out of range, the name is unknown, the path is wrong or cannot be read, the data are
            malformed, parts share images, or `image_size` or `crop_fraction` differs from that of images that are not
            resized.
        EnvironmentProblem: the data set is not on this machine and cannot be downloaded, or a package is missing.
    """
    if not 0 < crop_fraction <= 1:
        raise UsageError(f"data.crop_fraction must be in (0, 1], got {crop_fraction}. Usual for ImageNet: 0.875.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    known = str(name) in (SAMPLE, *_TORCHVISION)
    try:
        if known:
            bundle, published = _named(str(name), root or data_root()), True
        else:
            bundle, published = _at(Path(name), Wanted(size, crop_fraction, class_order), seed)
        bundle = finished(bundle, validation, seed, published)
    except OSError as error:
        raise UsageError(f"cannot read {str(error.filename or name)[:300]}: {error.strerror or error}") from error
    if size not in (None, bundle.input_size[1:]):
        found = "x".join(map(str, bundle.input_size[1:]))
        raise UsageError(
            f"data.image_size resizes folders and Hugging Face data sets; the images of {bundle.name} are {found}. "
            "Leave it out."
        )
    if crop_fraction != 1 and (known or Path(name).suffix.lower() == ".npz"):
        raise UsageError(
            f"data.crop_fraction crops images of folders and Hugging Face data sets, not those of {bundle.name}. "
            "Leave it out."
        )
    return bundle


def _named(name: str, root: Path) -> DataBundle:
    if name == SAMPLE:
        return load_sample()
    prepared = root / f"{name}.npz"
    bundle = replace(load_npz(prepared, BY_DATA[name]), name=name) if prepared.is_file() else _torchvision(name, root)
    if name == "cifar10":
        mean, std = _CIFAR_MEAN_STD
        bundle = replace(bundle, mean=mean, std=std)
    return bundle


@dataclass(frozen=True)
class Wanted:
    """How images that are not yet in their final form are read; see `load_data`."""

    size: tuple[int, int] | None
    fraction: float
    class_order: ClassOrder


def _at(path: Path, wanted: Wanted, seed: int) -> tuple[DataBundle, bool]:
    """Return the data at a path, and whether their splits are those of a published data set."""
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise UsageError(f"no data at {str(path)!r}: {error}") from error
    if hugging_face.is_source(path):
        size, fraction = wanted.size, wanted.fraction
        return hugging_face.load_hugging_face(path, image_size=size, crop_fraction=fraction, seed=seed), False
    if path.is_dir():
        found = load_folder(
            path, image_size=wanted.size, crop_fraction=wanted.fraction, class_order=wanted.class_order, seed=seed
        )
        return found, is_tiny_imagenet(path)
    if path.is_file() and path.suffix.lower() != ".npz":
        raise UsageError(
            f"data {path} is a {path.suffix or 'nameless'} file. "
            "Give an .npz, .parquet or .tar file, a folder or a known name."
        )
    if not path.exists():
        known = [SAMPLE, *_TORCHVISION]
        raise UsageError(
            f"no data at {str(path)!r}.{did_you_mean(str(path), known)} "
            f"Give {', '.join(known)}, a path to an .npz, .parquet or .tar file, or a folder of images."
        )
    return load_npz(path), False


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
    return in_memory(name, {"train": train, "test": test}, BY_DATA[name])


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
