"""Images on disk: class folders, and the layout of Tiny-ImageNet."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from .base import DataBundle
from .bundles import of_any_kind
from .images import Form, Size, common_form, decode_all, decode_whole
from .splits import file_keys, split_off

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
PARTS = ("train", "val", "valid", "validation", "test")
_LIKE_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
ClassOrder = Literal["text", "natural"]

_NO_DATA = frozenset({"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"})
"""What file managers and file systems leave in folders, in lower case; neither are names data that begin with a dot."""
_NAMED_CLASSES = 12
_Samples = list[tuple[Path, int]]


@dataclass(frozen=True)
class FolderImages:
    """Images that are decoded on access by a pool of threads.

    Attributes:
        paths: file of each image.
        labels: int64 [N].
        input_size: (channels, height, width) of the returned images. Images of another size are resized to cover it and
            centre-cropped.
        keys: a value for each image that equal files share; may be left out.
        fraction: share of the sides of the centre crop that is kept; see `images.Form`.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    input_size: Size
    keys: tuple[Hashable, ...] = field(default=(), repr=False)
    fraction: float = 1.0

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8 [N, C, H, W]) and labels (int64 [N]) at `indices`.

        Raises:
            UsageError: a file cannot be decoded.
        """
        chosen = [self.paths[i] for i in indices.tolist()]
        form = Form(self.input_size, self.fraction)
        return decode_all(chosen, [str(path) for path in chosen], form), self.labels[indices]

    def originals(self, indices: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return images as they are stored, each uint8 [C, H, W] of its own size, and labels (int64 [N]).

        Raises:
            UsageError: a file cannot be decoded.
        """
        chosen = [self.paths[i] for i in indices.tolist()]
        return decode_whole(chosen, [str(path) for path in chosen], self.input_size[0]), self.labels[indices]

    def name_of(self, position: int) -> str:
        """Return the path of an image."""
        return str(self.paths[position])


def load_folder(
    root: Path,
    *,
    image_size: tuple[int, int] | None = None,
    crop_fraction: float = 1.0,
    class_order: ClassOrder = "text",
    seed: int = 0,
) -> DataBundle:
    """Read a folder of images: ``train/`` and ``test/`` with class folders, class folders alone, or Tiny-ImageNet.

    ``val/``, ``valid/`` or ``validation/`` may replace ``test/``; if both exist, they are the validation part. If the
    folder has class folders alone, a random fifth of each class becomes the test part, and a note says so. ``val/`` of
    Tiny-ImageNet is its test part. Hidden files and folders are not data; notes say how many files were left out.

    Args:
        root: the folder.
        image_size: (height, width) of the images; by default their own size if it is the same for all (of up to 2,000
            images), else 224x224. Images stay grey if all are.
        crop_fraction: share of the sides of the centre crop that is kept; see `images.Form`.
        class_order: how classes are numbered: by their names as text, as torchvision does, or with the numbers in them
            compared as numbers, as timm does.
        seed: random seed of the split.

    Raises:
        UsageError: there are no images, a class is empty, classes differ between splits, an image cannot be decoded, or
            images show nothing.
        OSError: a file or folder cannot be read.
    """
    skipped: Counter[str] = Counter()
    notes: list[str] = []
    if is_tiny_imagenet(root):
        folders, splits = _tiny_imagenet(root, class_order, skipped)
        names = _readable(root, folders)
    elif (root / "train").is_dir():
        names, splits = _split_folders(root, class_order, skipped)
        folders = names
    else:
        names = folders = _class_names(root, class_order)
        splits = {"train": _samples(root, names, skipped)}
    keys = dict(zip(paths := _paths(splits), file_keys(paths), strict=True))
    if "test" not in splits:
        splits, note = _split_off(root, splits["train"], keys, seed)
        notes.append(note)
    notes += [note for note in (_order_note(folders, class_order), _skipped_note(skipped)) if note]
    paths = _paths(splits)
    input_size, changed = common_form(len(paths), lambda i: (paths[i], str(paths[i])), image_size, seed)
    parts = {part: _images(samples, keys, input_size, crop_fraction) for part, samples in splits.items()}
    return of_any_kind(root.name, parts, names, input_size, (*notes, *changed), seed)


def is_tiny_imagenet(root: Path) -> bool:
    """Return whether a folder has the layout in which Tiny-ImageNet was published."""
    return (root / "val" / "val_annotations.txt").is_file()


def _paths(splits: Mapping[str, _Samples]) -> list[Path]:
    return [path for samples in splits.values() for path, _ in samples]


def _images(samples: _Samples, keys: Mapping[Path, Hashable], input_size: Size, fraction: float) -> FolderImages:
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    paths = tuple(path for path, _ in samples)
    return FolderImages(paths, labels, input_size, tuple(keys[path] for path in paths), fraction)


def _split_folders(root: Path, order: ClassOrder, skipped: Counter[str]) -> tuple[tuple[str, ...], dict[str, _Samples]]:
    *held_out, last = [name for name in PARTS if (root / name).is_dir()]
    if not held_out:
        raise UsageError(f"{root} has train/ but none of val/, valid/, validation/ or test/. Add a held-out folder.")
    if len(held_out) > 2:
        raise UsageError(f"{root} has {', '.join([*held_out, last])}. Keep train, one for validation, and test.")
    names = _class_names(root / "train", order)
    parts = {"train": "train", **({"validation": held_out[1]} if len(held_out) > 1 else {}), "test": last}
    return names, {part: _samples(root / folder, names, skipped) for part, folder in parts.items()}


def _split_off(
    root: Path, samples: _Samples, keys: Mapping[Path, Hashable], seed: int
) -> tuple[dict[str, _Samples], str]:
    own = [keys[path] for path, _ in samples]
    test = split_off(torch.tensor([label for _, label in samples]), own, seed).tolist()
    repeated = len(own) - len(set(own))
    note = f"{root.name} has no test folder: {sum(test)} of its images were set aside under seed {seed}"
    note += f", equal ones together ({repeated} are copies of others)" if repeated else ""
    pairs = list(zip(samples, test, strict=True))
    return {"train": [s for s, held in pairs if not held], "test": [s for s, held in pairs if held]}, note


def _class_names(folder: Path, order: ClassOrder) -> tuple[str, ...]:
    names = _class_folders(folder)
    if len(names) < 2:
        forms = "Expected train/<class>/*.jpg and test/<class>/*.jpg, or <class>/*.jpg."
        hint = next((f"Did you mean {folder / name}?" for name in names if (folder / name / "train").is_dir()), forms)
        raise UsageError(f"{folder} has {len(names)} class folders; at least 2 are needed. {hint}")
    if {name.lower() for name in names} <= _LIKE_SPLITS and not set(names) <= set(PARTS):
        raise UsageError(f"{folder} has {' and '.join(names)}, which look like splits. Call them train and test.")
    if set(names) <= set(PARTS):
        raise UsageError(f"{folder} has {' and '.join(names)} but no train. Expected train/<class>/*.jpg beside them.")
    for name in names:
        if not name.isprintable() or any("\ud800" <= c <= "\udfff" for c in name):
            raise UsageError(f"the class folder {name!a} of {folder} has a name that is not text. Rename it.")
    return _ordered(names, order)


def _class_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not _is_no_data(p.name) and p.is_dir())


def _is_no_data(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NO_DATA


def _ordered(names: Iterable[str], order: ClassOrder) -> tuple[str, ...]:
    text = sorted(names)
    return tuple(sorted(text, key=_natural) if order == "natural" else text)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts as timm does: case is ignored, and numbers in the name count as numbers."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts]


def _order_note(names: tuple[str, ...], order: ClassOrder) -> str:
    other: ClassOrder = "natural" if order == "text" else "text"
    if _ordered(names, other) == names:
        return ""
    shown = ", ".join(f"{name} → {index}" for index, name in enumerate(names[:_NAMED_CLASSES]))
    more = ", …" if len(names) > _NAMED_CLASSES else ""
    how = {"text": "as text, as by torchvision", "natural": "with numbers as numbers, as by timm"}
    return f"class names are sorted {how[order]}: {shown}{more}; data.class_order={other} sorts them {how[other]}"


def _samples(folder: Path, names: tuple[str, ...], skipped: Counter[str]) -> _Samples:
    present = set(_class_folders(folder))
    strange = sorted(present - set(names))
    if strange:
        raise UsageError(f"{folder} has the class {strange[0]!r}, which the training folder lacks")
    if not present:
        raise UsageError(f"{folder} has no class folders; expected {names[0]}, …")
    for path in folder.iterdir():
        if path.name not in present and (path.is_dir() or path.suffix.lower() in EXTENSIONS):
            skipped.update(_hidden(path) if _is_no_data(path.name) else {"outside class folders": 1})
    samples: _Samples = []
    for label, name in enumerate(names):
        if name not in present:
            continue
        left_out: Counter[str] = Counter()
        files = _image_files(folder / name, left_out)
        if not files:
            found = f"; found {_counted(left_out)}" if left_out else ""
            raise UsageError(
                f"the class folder {folder / name} holds no images ({', '.join(sorted(EXTENSIONS))}){found}"
            )
        skipped.update(left_out)
        samples += [(path, label) for path in files]
    return samples


def _image_files(folder: Path, skipped: Counter[str]) -> list[Path]:
    """Return the images below a folder, and count other files by what they are; links are followed once."""
    found: list[Path] = []
    visited = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    for at, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here, real = Path(at), os.path.realpath(at)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        for name in folders:
            if _is_no_data(name):
                skipped.update(_hidden(here / name))
        folders[:] = sorted(name for name in folders if not _is_no_data(name))
        for name in files:
            suffix = Path(name).suffix.lower()
            if _is_no_data(name):
                skipped["hidden"] += 1
            elif suffix not in EXTENSIONS:
                skipped[suffix or "without suffix"] += 1
            elif not os.path.isfile(here / name):
                skipped["linked to nothing"] += 1
            else:
                found.append(here / name)
    return sorted(found)


def _hidden(path: Path) -> dict[str, int]:
    inside = sum(len(files) for _, _, files in os.walk(path)) if path.is_dir() else 1
    return {"hidden": inside} if inside else {}


def _raise(error: OSError) -> None:
    raise error


def _counted(skipped: Counter[str]) -> str:
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in ordered)


def _skipped_note(skipped: Counter[str]) -> str:
    total = skipped.total()
    return f"{total:,} file{' was' if total == 1 else 's were'} skipped: {_counted(skipped)}" if total else ""


def _tiny_imagenet(root: Path, order: ClassOrder, skipped: Counter[str]) -> tuple[tuple[str, ...], dict[str, _Samples]]:
    names = _class_names(root / "train", order)
    label_of = {name: label for label, name in enumerate(names)}
    test: _Samples = []
    annotations = root / "val" / "val_annotations.txt"
    for number, line in enumerate(_lines(annotations), start=1):
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
    return names, {"train": _samples(root / "train", names, skipped), "test": test}


def _readable(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    words = root / "words.txt"
    if not words.is_file():
        return names
    known = {
        key: text.split(",")[0].strip() for key, text in (line.split("\t", 1) for line in _lines(words) if "\t" in line)
    }
    return tuple(known.get(name, name) for name in names)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Store it as UTF-8."
        ) from error
