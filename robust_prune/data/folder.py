"""Images on disk: class folders, and the layout of Tiny-ImageNet."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from .base import DataBundle, ImageSet, mixing_order
from .npz import channel_statistics

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
TEST_SHARE = 0.2
"""Share in [0, 1] of each class that becomes the test part if a folder has none."""

DEFAULT_SIDE = 224
"""Height and width in pixels of resized images, if sizes differ and the caller names none."""

_PROBED = 64
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_STATISTICS_IMAGES = 1024


@dataclass(frozen=True)
class FolderImages:
    """Images that are decoded on access by a pool of threads.

    Attributes:
        paths: file of each image.
        labels: int64 [N].
        input_size: (channels, height, width) of the returned images. Images of another size are resized to cover it and
            centre-cropped.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    input_size: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8 [N, C, H, W]) and labels (int64 [N]) at `indices`.

        Raises:
            UsageError: a file cannot be decoded.
        """
        chosen = [self.paths[i] for i in indices.tolist()]
        arrays = list(_pool().map(lambda path: decode(path, self.input_size), chosen))
        channels, height, width = self.input_size
        images = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0, channels, height, width).byte()
        return images, self.labels[indices]


def decode(path: Path, input_size: tuple[int, int, int]) -> np.ndarray:
    """Return one image as uint8 [C, H, W] of `input_size`; one channel is greyscale, three are colour.

    Raises:
        UsageError: the file cannot be decoded.
    """
    channels, height, width = input_size
    try:
        with Image.open(path) as stream:
            image = _eight_bits(stream).convert("L" if channels == 1 else "RGB")
    except _UNREADABLE as error:
        raise UsageError(f"cannot decode the image {path}: {error}. Remove or replace it.") from error
    if image.size != (width, height):
        image = _resized(image, height, width)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


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


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = max(width / image.width, height / image.height)
    new = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - width) // 2, (new[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def load_folder(root: Path, *, input_size: tuple[int, int, int] | None = None, seed: int = 0) -> DataBundle:
    """Read a folder of images: ``train/`` and ``test/`` with class folders, class folders alone, or Tiny-ImageNet.

    ``val/``, ``valid/`` or ``validation/`` may replace ``test/``; if both exist, they are the validation part. If the
    folder has class folders alone, a random fifth of each class becomes the test part, and a note says so. ``val/`` of
    Tiny-ImageNet is its test part.

    Args:
        root: the folder.
        input_size: (channels, height, width) of the images; by default their own size if it is the same for all (of up
            to 64 images), else 224x224.
        seed: random seed of the split.

    Raises:
        UsageError: there are no images, a class is empty, classes differ between splits, or an image cannot be decoded.
    """
    notes: list[str] = []
    if (root / "val" / "val_annotations.txt").is_file():
        names, labels_shown, splits = _tiny_imagenet(root)
    elif (root / "train").is_dir():
        names, splits = _split_folders(root)
        labels_shown = names
    else:
        names, splits = _split_off(root, seed)
        labels_shown = names
        notes.append(
            f"{root.name} has no test folder: {len(splits['test'])} of its images were set aside under seed {seed}"
        )
    if input_size is None:
        input_size, note = _common_size([path for path, _ in splits["train"]], seed)
        notes += [note] if note else []
    train, validation, test = (_images(splits.get(part, []), input_size) for part in ("train", "validation", "test"))
    mean, std = channel_statistics(_probe(train, _STATISTICS_IMAGES, seed))
    return DataBundle(root.name, train, validation, test, labels_shown, mean, std, input_size, notes=tuple(notes))


_Samples = list[tuple[Path, int]]


def _images(samples: _Samples, input_size: tuple[int, int, int]) -> FolderImages:
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    order = mixing_order(labels)
    return FolderImages(tuple(samples[i][0] for i in order.tolist()), labels[order], input_size)


def _probe(images: ImageSet, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.get(order[:count])[0]


def _split_folders(root: Path) -> tuple[tuple[str, ...], dict[str, _Samples]]:
    held_out = [name for name in ("val", "valid", "validation", "test") if (root / name).is_dir()]
    if not held_out:
        raise UsageError(f"{root} has train/ but none of val/, valid/, validation/ or test/. Add a held-out folder.")
    names = _class_names(root / "train")
    splits = {"train": _samples(root / "train", names), "test": _samples(root / held_out[-1], names)}
    if len(held_out) > 1:
        splits["validation"] = _samples(root / held_out[0], names)
    return names, splits


def _split_off(root: Path, seed: int) -> tuple[tuple[str, ...], dict[str, _Samples]]:
    names = _class_names(root)
    splits: dict[str, _Samples] = {"train": [], "test": []}
    generator = torch.Generator().manual_seed(seed)
    samples = _samples(root, names)
    for label, name in enumerate(names):
        of_class = [sample for sample in samples if sample[1] == label]
        if len(of_class) < 2:
            raise UsageError(f"class {name!r} of {root} has {len(of_class)} image; at least 2 are needed to split it")
        count = max(1, round(TEST_SHARE * len(of_class)))
        chosen = set(torch.randperm(len(of_class), generator=generator)[:count].tolist())
        for index, sample in enumerate(of_class):
            splits["test" if index in chosen else "train"].append(sample)
    return names, splits


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(names) < 2:
        raise UsageError(
            f"{folder} has {len(names)} class folders; at least 2 are needed. "
            "Expected train/<class>/*.jpg and test/<class>/*.jpg, or <class>/*.jpg."
        )
    return names


def _samples(folder: Path, names: tuple[str, ...]) -> _Samples:
    present = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    strange = sorted(present - set(names))
    if strange:
        raise UsageError(f"{folder} has the class {strange[0]!r}, which the training folder lacks")
    if not present:
        raise UsageError(f"{folder} has no class folders; expected {names[0]}, …")
    samples: _Samples = []
    for label, name in enumerate(names):
        if name not in present:
            continue
        files = _image_files(folder / name)
        if not files:
            raise UsageError(f"the class folder {folder / name} holds no images ({', '.join(sorted(EXTENSIONS))})")
        samples += [(path, label) for path in files]
    return samples


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())


def _tiny_imagenet(root: Path) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, _Samples]]:
    names = _class_names(root / "train")
    label_of = {name: label for label, name in enumerate(names)}
    test: _Samples = []
    annotations = root / "val" / "val_annotations.txt"
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label_of:
            raise UsageError(
                f"{annotations}:{number}: expected <image><tab><one of train/'s folders>, got {line[:60]!r}"
            )
        path = root / "val" / "images" / fields[0]
        if not path.is_file():
            raise UsageError(f"{annotations}:{number} names {path}, which does not exist")
        test.append((path, label_of[fields[1]]))
    if not test:
        raise UsageError(f"{annotations} names no images")
    return names, _readable(root, names), {"train": _samples(root / "train", names), "test": test}


def _readable(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    words = root / "words.txt"
    if not words.is_file():
        return names
    pairs = (line.split("\t", 1) for line in words.read_text(encoding="utf-8").splitlines() if "\t" in line)
    known = {key: text.split(",")[0].strip() for key, text in pairs}
    return tuple(known.get(name, name) for name in names)


def _common_size(paths: list[Path], seed: int) -> tuple[tuple[int, int, int], str]:
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:_PROBED].tolist()
    sizes, modes = set(), set()
    for index in order:
        try:
            with Image.open(paths[index]) as image:
                sizes.add(image.size)
                modes.add(image.mode)
        except _UNREADABLE as error:
            raise UsageError(f"cannot decode the image {paths[index]}: {error}. Remove or replace it.") from error
    channels = 1 if modes <= {"L", "LA", "1", "I;16", "I;16B", "I;16L"} else 3
    if len(sizes) == 1:
        width, height = sizes.pop()
        return (channels, height, width), ""
    note = f"images differ in size: each is resized and centre-cropped to {DEFAULT_SIDE}x{DEFAULT_SIDE}"
    return (channels, DEFAULT_SIDE, DEFAULT_SIDE), note
