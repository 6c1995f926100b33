"""Images from an .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.data_files import arrays, as_rows, everything, write_npz

from robust_prune.data.npz import load_npz
from robust_prune.data.sources import load_data
from robust_prune.errors import UsageError


def test_npz_is_split_without_touching_the_test_part(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz")
    bundle = load_data(path, validation=10, seed=1)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (30, 10, 10)
    assert bundle.input_size == (3, 8, 8) and bundle.num_classes == 4
    assert not as_rows(bundle.train) & as_rows(bundle.validation)
    source = arrays()
    images, labels = everything(bundle.test)
    assert torch.equal(images, torch.from_numpy(source["x_test"]).permute(0, 3, 1, 2))
    assert labels.tolist() == source["y_test"].tolist()
    expected = source["x_train"].reshape(-1, 3) / 255
    assert bundle.mean == pytest.approx(expected.mean(0), abs=2e-4)
    assert bundle.std == pytest.approx(expected.std(0), abs=2e-4)


def test_the_validation_part_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz")
    one, again, other = (as_rows(load_data(path, validation=10, seed=seed).validation) for seed in (1, 1, 2))
    assert one == again != other
    assert len(load_data(path).validation) == 4
    with pytest.raises(UsageError, match="at least 1"):
        load_data(path, validation=0)
    with pytest.raises(UsageError, match="cannot hold out 40 of 40"):
        load_data(path, validation=40)


def test_grey_npz_has_one_channel(tmp_path: Path) -> None:
    bundle = load_data(write_npz(tmp_path / "d.npz", **arrays(grey=True)))
    assert bundle.input_size == (1, 8, 8) and len(bundle.mean) == 1


BAD = arrays()


NAN = np.full(BAD["x_train"].shape, np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "lacks y_test; found x_train, y_train, x_test"),
        ({"x_train": NAN}, r"x_train must be uint8, or float in \[0, 1\], got NaN"),
        ({"x_train": BAD["x_train"].transpose(0, 3, 1, 2)}, r"must be \[N, H, W, C\]"),
        ({"x_test": BAD["x_test"][:, :4]}, "train holds images of"),
        ({"y_train": BAD["y_train"][:-1]}, "40 images in x_train but 39 labels in y_train"),
        ({"y_train": BAD["y_train"].astype(float)}, "must hold integers"),
        ({"y_train": BAD["y_train"].astype(int) - 1}, "negative label -1"),
        ({"y_test": BAD["y_test"] + 5}, "y_test holds the label 8, y_train goes to 3 only"),
        ({"x_test": BAD["x_test"][:0], "y_test": BAD["y_test"][:0]}, "x_test: there are no images"),
        ({"y_train": BAD["y_train"] * 0, "y_test": BAD["y_test"] * 0}, "single class"),
    ],
)
def test_malformed_npz(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_data(write_npz(tmp_path / "d.npz", **changes))


def test_files_that_are_not_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    whole = write_npz(tmp_path / "d.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "objects.npz", **(arrays() | {"y_train": np.array([{}] * 40, dtype=object)}))
    for name in ("text.npz", "torn.npz", "objects.npz"):
        with pytest.raises(UsageError, match=r"not a readable \.npz"):
            load_npz(tmp_path / name)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"is a .csv file"):
        load_data(tmp_path / "d.csv")
    with pytest.raises(UsageError, match="Did you mean cifar10"):
        load_data("cifar_10")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (np.zeros(2_000_000, "<U1"), r"class_names must be at most 1,000,000 texts .* the shape \(2000000,\)"),
        (np.zeros(4, "<U2000"), "must be at most 1,000,000 texts of 200 characters, got <U2000"),
        (np.zeros((4, 2)), "got float64"),
        (np.array(["a", "b\x1b[2J", "c", "d"]), r"the class name 'b\\x1b\[2J' has control characters"),
    ],
)
def test_names_of_classes_are_few_short_and_printable(tmp_path: Path, names: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_data(write_npz(tmp_path / "d.npz", class_names=names))


def test_a_hundred_bytes_cannot_describe_billions_of_names(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz")
    header = "{'descr': '<U0', 'fortran_order': False, 'shape': (2000000000,), }"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("class_names.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(UsageError, match=r"the shape \(2000000000,\)"):
        load_data(path)
