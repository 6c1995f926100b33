"""What is wrong with arrays is said in one line, whether they come in a file or from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.data_files import arrays, everything, write_npz
from torch.utils.data import Dataset, TensorDataset

import robust_prune as rp
from robust_prune.data.base import DataBundle, TensorImages
from robust_prune.errors import UsageError

GOOD = arrays(40, 12)
X, Y = GOOD["x_train"], GOOD["y_train"].astype(np.int64)


def from_file(folder: Path, changes: dict[str, Any]) -> DataBundle:
    return rp.load_data(write_npz(folder / "d.npz", **(GOOD | changes)))


def from_python(_: Path, changes: dict[str, Any]) -> DataBundle:
    given = GOOD | changes
    return rp.load_data({part: (given[f"x_{part}"], given[f"y_{part}"]) for part in ("train", "test")})


DOORS = pytest.mark.parametrize("door", [from_file, from_python])
Door = Callable[[Path, dict[str, Any]], DataBundle]


@DOORS
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_train": Y + 1, "y_test": GOOD["y_test"] + 1}, "labels run from 1 to 4, and there is no 0. Subtract 1"),
        ({"y_train": Y + 7, "y_test": GOOD["y_test"] + 7}, "labels run from 7 to 10, and there is no 0. Subtract 7"),
        ({"y_train": np.where(Y == 2, 9, Y)}, "labels go up to 9, but 2, 4, 5, 6, 7 and 1 more never occur.*0 to 3"),
        ({"y_train": np.where(Y == 2, 10**9, Y)}, "holds the label 1000000000; there can be 1,000,000 classes"),
        ({"y_test": GOOD["y_test"] + 1}, "holds the label 4, .* goes to 3 only"),
        ({"y_train": Y - 1}, "holds the negative label -1"),
        ({"y_train": Y.astype(np.float32)}, "must hold integers, got float32. Cast them"),
        ({"y_train": np.where(Y == 1, np.nan, Y)}, "must hold integers, got float64 with NaN"),
        ({"y_train": Y > 1}, "must hold integers, got bool"),
        ({"y_train": np.eye(4)[Y]}, r"must be one class an image, \[N\], got \(40, 4\). Take the argmax"),
        ({"y_train": Y[:, None, None]}, r"got \(40, 1, 1\)"),
        ({"y_train": np.array(["a", "b", "c", "d"])[Y]}, "must be numbers in an array of one shape"),
        ({"y_train": np.int64(3)}, r"must be one class an image, \[N\], got \(\)"),
        ({"y_train": Y[:-1]}, "40 images in .* but 39 labels"),
        ({"x_train": X // 128}, "only the values 0 and 1 occur, as when floats .* Multiply by 255 before casting"),
        ({"x_test": GOOD["x_test"] // 128}, "test.*only the values 0 and 1 occur"),
        ({"x_train": X * 0}, "every pixel has the value 0, so the images show nothing"),
        ({"x_test": GOOD["x_test"] * 0 + 255}, "test.*every pixel has the value 255"),
        ({"x_train": X.astype(np.float32)}, "got float32 from 0 to 255. Round and cast to uint8, or divide by 255"),
        ({"x_train": (X / 255 - 0.45) / 0.22}, "got float64 from -2.045 to 2.5. Leave normalization to the model"),
        ({"x_train": np.where(X > 250, np.inf, X / 255)}, "got NaN or infinite values"),
        ({"x_train": X.astype(np.int64)}, "got int64 from 0 to 255. Cast to uint8"),
        ({"x_train": X > 9}, "got bool. Cast to uint8 and multiply by 255"),
        ({"x_train": X.reshape(40, -1)}, "with 1, 3 or 4 channels, got"),
        ({"x_train": X[..., None]}, "with 1, 3 or 4 channels, got"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "train.*there are no images"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "test.*there are no images"),
        ({"x_train": X[:, :, :0]}, "the images are empty"),
        ({"x_test": GOOD["x_test"][:, :4]}, r"train holds images of \(3, 8, 8\), test of \(3, 4, 8\)"),
        (
            {"x_test": X[[3, *range(11)]]},
            "12 of 12 test images are images of the training part as well, such as number 0",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, door: Door, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        door(tmp_path, changes)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(tmp_path))


@DOORS
def test_usual_forms_are_taken(tmp_path: Path, door: Door) -> None:
    for changes in (
        {"y_train": Y[:, None]},
        {"x_train": X / np.float32(255)},
        {"x_train": X.astype(">f8") / 255, "y_train": Y.astype(">i4")},
        {"y_train": Y.astype(np.uint64)},
    ):
        bundle = door(tmp_path, changes)
        assert (len(bundle.train), len(bundle.validation), bundle.num_classes) == (36, 4, 4) and bundle.notes == ()
    masks = np.random.default_rng(1).integers(0, 2, (40, 8, 8, 3)).astype(np.uint8) * 255
    assert door(tmp_path, {"x_train": masks}).num_classes == 4


def test_a_class_may_be_missing_where_names_are_given(tmp_path: Path) -> None:
    names = ("ant", "bee", "cat", "dog", "eel")
    note = "train labels: no image is of the class eel"
    bundle = rp.load_data({"train": (X, Y), "test": (GOOD["x_test"], GOOD["y_test"])}, class_names=names)
    assert bundle.num_classes == 5 and note in bundle.notes
    bundle = from_file(tmp_path, {"class_names": np.array(names)})
    assert bundle.class_names == names and "y_test: no image is of the class eel" in bundle.notes
    with pytest.raises(UsageError, match="label 3 found, but only 2 class names"):
        from_file(tmp_path, {"class_names": np.array(names[:2])})


class Items(Dataset):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Any:
        return self.items[position]


class Unsized(Dataset):
    def __getitem__(self, position: int) -> Any:
        return torch.zeros(3, 8, 8), 0


class Broken(Items):
    def __getitem__(self, position: int) -> Any:
        raise KeyError("lost")


ZERO = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Items(), "must give .image, label. pairs, and at least one"),
        (Items({"image": 1}), "must give .image, label. pairs"),
        (Items((ZERO, 0), (torch.zeros(3, 8, 9), 1)), "different shapes or types, such as .* Resize them"),
        (Items((ZERO, "cat")), "whole numbers as labels"),
        (Items((ZERO, torch.zeros(4))), "whole numbers as labels"),
        (Items((ZERO, 0.5), (ZERO, 1.0)), "must hold integers, got float32"),
        (Items(("text", 0)), "must give images and whole numbers"),
        (Unsized(), "the train dataset cannot be read: TypeError"),
        (Broken(1), "the train dataset cannot be read: KeyError: 'lost'"),
        (TensorImages(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0).long()), "there are no images"),
        (([[1, 2], [3]], [0, 1]), "must be numbers in an array of one shape"),
        ("ab", "must be a torch Dataset or a pair"),
    ],
)
def test_odd_objects_are_refused(dataset: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        rp.load_data({"train": dataset, "test": (GOOD["x_test"], GOOD["y_test"])})
    assert "\n" not in str(raised.value)


def test_a_bundle_without_images_is_refused() -> None:
    whole = TensorImages(torch.from_numpy(X).permute(0, 3, 1, 2), torch.from_numpy(Y))
    none = TensorImages(whole.images[:0], whole.labels[:0])
    for parts, words in (((none, none, whole), "no training images"), ((whole, none, none), "no test images")):
        with pytest.raises(UsageError, match=words):
            rp.load_data(DataBundle("mine", *parts, tuple("abcd"), (0.5,) * 3, (0.5,) * 3, (3, 8, 8)))


def test_a_grey_dataset_of_pillow_images_is_taken() -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 6), dtype=np.uint8)
    pillow = Items(*((Image.fromarray(x), i % 2) for i, x in enumerate(pixels)))
    bundle = rp.load_data({"train": pillow, "test": TensorDataset(torch.rand(4, 1, 6, 6), torch.arange(4) % 2)})
    assert bundle.input_size == (1, 6, 6)
    assert everything(bundle.test)[0].stride() == (36, 36, 6, 1)
