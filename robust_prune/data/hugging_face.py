"""Data sets of the Hugging Face `datasets` library that are on this machine; the network is never asked."""

from __future__ import annotations

import glob
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import track
from ..errors import EnvironmentProblem, UsageError
from .base import DataBundle, ImageSet, Subset, TensorImages, labels_of
from .bundles import of_any_kind
from .checks import checked_labels
from .folder import EXTENSIONS
from .images import Form, Size, Source, common_form, decode_all, decode_whole
from .shards import check_shards
from .splits import keys_of, split_off

PARTS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
LABELS = ("label", "labels", "fine_label", "target", "class", "cls")
IMAGES = ("image", "images", "img")
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
"""What the library calls the files of each suffix."""
IN_MEMORY_BYTES = 2_000_000_000
"""Largest size of all images, decoded, at which they are kept in memory."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class RowImages:
    """Images in the rows of a table, decoded on access by a pool of threads.

    Attributes:
        rows: a `datasets.Dataset` whose column `column` gives encoded images.
        column: name of the column.
        labels: int64 [N].
        input_size, fraction: as for `FolderImages`.
        keys: a value for each image that equal ones share; may be left out.
    """

    rows: Any
    column: str
    labels: Tensor
    input_size: Size
    keys: tuple[Hashable, ...] = field(default=(), repr=False)
    fraction: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8 [N, C, H, W]) and labels (int64 [N]) at `indices`.

        Raises:
            UsageError: an image is missing or cannot be decoded.
        """
        numbers, form = indices.tolist(), Form(self.input_size, self.fraction)
        sources = self.sources(numbers)
        return decode_all(sources, [self.name_of(i) for i in numbers], form), self.labels[indices]

    def originals(self, indices: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return images as they are stored, each uint8 [C, H, W] of its own size, and labels (int64 [N]).

        Raises:
            UsageError: an image is missing or cannot be decoded.
        """
        numbers = indices.tolist()
        names = [self.name_of(i) for i in numbers]
        return decode_whole(self.sources(numbers), names, self.input_size[0]), self.labels[indices]

    def sources(self, numbers: Sequence[int]) -> list[Source]:
        """Return the encoded images in some rows."""
        cells = self.rows[list(numbers)][self.column]
        return [_source(cell, self.name_of(i)) for i, cell in zip(numbers, cells, strict=True)]

    def name_of(self, position: int) -> str:
        """Return the split and the row of an image."""
        return f"row {position} of {self.rows.split or self.column}"


def is_source(path: Path) -> bool:
    """Return whether a path is a ``.parquet`` or ``.tar`` file, a folder of them, or what ``save_to_disk`` wrote."""
    return bool(_suffix(path)) or _is_saved(path)


def _suffix(path: Path) -> str:
    """Return the suffix of the files that are read; empty for what is no table or no shard."""
    if path.is_file():
        return path.suffix.lower() if path.suffix.lower() in BUILDERS else ""
    if not path.is_dir():
        return ""
    train = path / "train"
    found = _first_of_interest(train if train.is_dir() else path)
    return found if found in BUILDERS else ""


def load_hugging_face(
    path: Path, *, image_size: tuple[int, int] | None = None, crop_fraction: float = 1.0, seed: int = 0
) -> DataBundle:
    """Read ``.parquet`` files (a clone from the hub), shards of WebDataset, or a folder that ``save_to_disk`` wrote.

    A shard is a ``.tar`` file whose images, such as ``0001.jpg``, stand beside their classes, ``0001.cls``; the library
    keeps a copy of the shards in its cache. Splits are known by the names of files, such as
    ``train-00000-of-00001.parquet`` or ``imagenet-train-0000.tar``, or their folders' names.

    Args:
        path: the file or folder.
        image_size, crop_fraction: see `from_splits`.
        seed: random seed of the split.

    Raises:
        UsageError: the files cannot be read, or as `from_splits`.
        EnvironmentProblem: the package `datasets` is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem(
            f'{path} is a Hugging Face data set; reading it needs the package datasets: pip install "robust-prune[hf]"'
        ) from error
    suffix = "" if _is_saved(path) else _suffix(path)
    files = _files(path, suffix) if suffix else {}
    if files and "::" in str(path):
        raise UsageError(f"{path} has '::' in its name, by which the package datasets joins addresses. Rename it.")
    if suffix == ".tar":
        check_shards([file for part in files.values() for file in part], EXTENSIONS)
    try:
        with _silent(datasets):
            if files:
                named = {part: [glob.escape(str(file)) for file in found] for part, found in files.items()}
                found = datasets.load_dataset(BUILDERS[suffix], data_files=named)
            else:
                found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises errors of many kinds for a damaged file
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UsageError(f"{path} cannot be read as a Hugging Face data set: {reason}") from error
    splits = found if isinstance(found, Mapping) else {"train": found}
    return from_splits(splits, path.name, image_size=image_size, crop_fraction=crop_fraction, seed=seed)


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Keep the library from printing bars, and lines about errors that it raises as well."""
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def is_table(value: Any) -> bool:
    """Return whether a value is a data set of the `datasets` library, of which no item is read."""
    return type(value).__module__.partition(".")[0] == "datasets" and hasattr(value, "features")


def from_splits(
    splits: Mapping[str, Any],
    name: str,
    *,
    image_size: tuple[int, int] | None = None,
    crop_fraction: float = 1.0,
    seed: int = 0,
) -> DataBundle:
    """Return the bundle of a `datasets.DatasetDict`, or another mapping of splits.

    Images of up to 2 GB, decoded, are kept in memory. Without a test split, the validation split takes its place;
    without either, a random fifth of each class does, and a note says so.

    Args:
        splits: data sets by split, with one column of images and one of labels.
        name: name of the data set.
        image_size: (height, width) of the images; by default as for folders.
        crop_fraction: share of the sides of the centre crop that is kept; see `images.Form`.
        seed: random seed of the split.

    Raises:
        UsageError: there is no training split, a column is missing or ambiguous, or images or labels are wrong.
    """
    tables = {PARTS[part]: table for part, table in splits.items() if part in PARTS}
    # The files of a clone come in the order of their names; what others are held against is the training part.
    tables = {part: tables[part] for part in ("train", "validation", "test") if part in tables}
    if "train" not in tables:
        raise UsageError(f"{name} has no split train; found {', '.join(map(str, splits)) or 'none'}")
    if "test" not in tables and "validation" in tables:
        tables["test"] = tables.pop("validation")
    left_out = [part for part in splits if part not in PARTS]
    notes = [f"the split{'s' if len(left_out) > 1 else ''} {', '.join(left_out)} was left out"] if left_out else []
    opened = {part: _open(table, f"{name}: {part}") for part, table in tables.items()}
    names = opened["train"][1]
    for part, (rows, other) in opened.items():
        if other != names:
            raise UsageError(f"{name}: the classes of {part}, {other[:3]} …, are not those of train, {names[:3]} …")
        if len(rows) == 0:
            raise UsageError(f"{name}: the split {part} is empty")
    places = [(rows, i) for rows, _ in opened.values() for i in range(len(rows))]

    def source(place: int) -> tuple[Source, str]:
        rows, i = places[place]
        return rows.sources([i])[0], rows.name_of(i)

    size, changed = common_form(len(places), source, image_size, seed)
    prepare = _in_memory if len(places) * math.prod(size) <= IN_MEMORY_BYTES else _with_keys
    parts: dict[str, ImageSet] = {
        part: prepare(replace(rows, input_size=size, fraction=crop_fraction)) for part, (rows, _) in opened.items()
    }
    if "test" not in parts:
        whole, labels = parts["train"], labels_of(parts["train"])
        test = split_off(labels, keys_of(whole) or range(len(whole)), seed)
        parts = {"train": Subset(whole, (~test).nonzero().flatten()), "test": Subset(whole, test.nonzero().flatten())}
        notes.append(f"{name} has no test split: {int(test.sum())} of its images were set aside under seed {seed}")
    return of_any_kind(name, parts, names, size, (*notes, *changed), seed)


def _in_memory(images: RowImages) -> ImageSet:
    decoded = []
    with track(f"Reading images of {images.rows.split or 'train'}", len(images)) as advance:
        for part in torch.arange(len(images)).split(_AT_ONCE):
            decoded.append(images.get(part)[0])
            advance(len(part))
    return TensorImages(torch.cat(decoded), images.labels)


def _with_keys(images: RowImages) -> ImageSet:
    keys: list[Hashable] = []
    with track(f"Comparing images of {images.rows.split or 'train'}", len(images)) as advance:
        for part in torch.arange(len(images)).split(_AT_ONCE):
            sources = images.sources(part.tolist())
            keys += [hashlib.blake2b(_bytes(source), digest_size=16).digest() for source in sources]
            advance(len(part))
    return replace(images, keys=tuple(keys))


def _bytes(source: Source) -> bytes:
    return source.read_bytes() if isinstance(source, Path) else source


def _source(cell: Any, name: str) -> Source:
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, dict) or (cell.get("bytes") is None and not cell.get("path")):
        raise UsageError(f"{name} has no image. Remove it.")
    found: bytes | None = cell.get("bytes")
    return Path(cell["path"]) if found is None else found


def _open(table: Any, where: str) -> tuple[RowImages, tuple[str, ...]]:
    """Return the images of a split, of unknown size, and its class names; no names if labels are plain numbers."""
    import datasets

    if not isinstance(table, datasets.Dataset):
        raise UsageError(f"{where} is a {type(table).__name__}, which has no length. Load it without streaming.")
    image = _column(table, where, "images", IMAGES, lambda f: isinstance(f, datasets.Image), _holds_bytes)
    label = _column(table, where, "labels", LABELS, lambda f: isinstance(f, datasets.ClassLabel), _holds_numbers)
    kind = table.features[label]
    table = table.with_format(None)
    labels = checked_labels(list(table[label]), f"{where}: column {label}")
    encoded = isinstance(table.features[image], datasets.Image)
    rows = table.select_columns([image])
    if encoded:
        rows = rows.cast_column(image, datasets.Image(decode=False))
    names = tuple(str(n) for n in kind.names) if isinstance(kind, datasets.ClassLabel) and kind.names else ()
    return RowImages(rows, image, labels, (3, 1, 1)), names


def _column(
    table: Any,
    where: str,
    what: str,
    usual: Sequence[str],
    typed: Callable[[Any], bool],
    possible: Callable[[Any], bool],
) -> str:
    """Return the column of images or of labels: the one of that type, else the one with a usual name."""
    features = table.features
    found = [name for name, feature in features.items() if typed(feature)]
    found = found or [name for name in features if name in usual and possible(features[name])]
    if len(found) > 1:
        raise UsageError(f"{where} has several columns of {what}: {', '.join(found)}. Keep one (remove_columns).")
    if not found:
        hint = " Labels of text become numbers by class_encode_column." if what == "labels" else ""
        raise UsageError(f"{where} has no column of {what}; its columns are {', '.join(features)}.{hint}")
    return found[0]


def _holds_bytes(feature: Any) -> bool:
    return "binary" in str(getattr(feature, "dtype", "")) or (isinstance(feature, dict) and "bytes" in feature)


def _holds_numbers(feature: Any) -> bool:
    return "int" in str(getattr(feature, "dtype", ""))


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _first_of_interest(folder: Path) -> str:
    """Return the suffix of the first image or table that is met below a folder, from the top, or else of a shard.

    An archive of images is often left beside the folders into which it was unpacked.
    """
    shards = False
    for _, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        suffixes = {Path(name).suffix.lower() for name in files if not name.startswith(".")}
        if ".parquet" in suffixes:
            return ".parquet"
        if suffixes & EXTENSIONS:
            return min(suffixes & EXTENSIONS)
        shards = shards or ".tar" in suffixes
    return ".tar" if shards else ""


def _files(path: Path, suffix: str) -> dict[str, list[Path]]:
    """Return the files of each split.

    Raises:
        UsageError: the files of a split are in several folders, as those of several configurations are.
    """
    if path.is_file():
        return {"train": [path]}
    below = (p for p in path.rglob("*") if p.suffix.lower() == suffix and p.is_file())
    files = sorted(p for p in below if not any(n.startswith(".") for n in p.relative_to(path).parts))
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [word for part in reversed(file.relative_to(path).parts) for word in re.split("[^a-z]+", part.lower())]
        splits.setdefault(next((PARTS[word] for word in words if word in PARTS), "train"), []).append(file)
    for part, found in splits.items():
        if len(folders := sorted({str(file.parent.relative_to(path)) for file in found})) > 1:
            raise UsageError(f"{path} has files of {part} in {', '.join(folders[:5])}. Give one of these folders.")
    return splits
