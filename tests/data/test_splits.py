"""No image is on both sides of a split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.data_files import arrays, as_rows, write_npz
from PIL import Image

from robust_prune.data.base import DataBundle, TensorImages
from robust_prune.data.sources import load_data
from robust_prune.data.splits import file_keys, finished
from robust_prune.errors import UsageError


def noise(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def class_folders(root: Path, count: int, start: int = 0) -> None:
    for i in range(count):
        write(root / "ab"[i % 2] / f"{i}.png", noise(start + i))


def test_folders_that_share_an_image_are_refused_by_name(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", 12)
    class_folders(tmp_path / "test", 6, 100)
    load_data(tmp_path, validation=2)
    write(tmp_path / "test" / "b" / "again.png", noise(3))
    (tmp_path / "test" / "a" / "link.png").symlink_to(tmp_path / "train" / "a" / "4.png")
    with pytest.raises(UsageError, match=r"2 of 8 test images .* such as .*link\.png and .*train/a/4\.png") as raised:
        load_data(tmp_path, validation=2)
    assert "\n" not in str(raised.value)
    (tmp_path / "test").rename(tmp_path / "val")
    class_folders(tmp_path / "test", 6, 200)
    bundle = load_data(tmp_path)
    assert bundle.notes == ("2 validation images are training images as well",)
    write(tmp_path / "test" / "b" / "again.png", noise(101))
    with pytest.raises(UsageError, match=r"1 of 7 test images is an image of the validation part as well"):
        load_data(tmp_path)


def test_a_published_data_set_is_noted_not_refused(tmp_path: Path) -> None:
    stored = arrays(40, 10)
    stored["x_test"][4] = stored["x_train"][7]
    write_npz(tmp_path / "svhn.npz", **stored)
    bundle = load_data("svhn", root=tmp_path)
    assert "1 of 10 test images is an image of the training part as well, as svhn was published" in bundle.notes
    with pytest.raises(UsageError, match="such as number 4 and number 7"):
        load_data(tmp_path / "svhn.npz")


def test_splits_of_ours_keep_equal_images_together(tmp_path: Path) -> None:
    for i in range(40):
        for copy in range(1 + 2 * (i % 4 == 0)):
            write(tmp_path / "ab"[i % 2] / f"{i}-{copy}.png", noise(i))
    for seed in range(3):
        bundle = load_data(tmp_path, validation=9, seed=seed)
        train, held, test = (as_rows(part) for part in (bundle.train, bundle.validation, bundle.test))
        assert not train & held and not (train | held) & test and len(train | held | test) == 40
        assert len(bundle.train) + len(bundle.validation) + len(bundle.test) == 60
        assert 12 <= len(bundle.test) <= 16 and 9 <= len(bundle.validation) <= 11
        assert "equal ones together (20 are copies of others)" in bundle.notes[0]


def test_oversampled_training_images_are_held_out_with_their_copies(tmp_path: Path) -> None:
    stored = arrays(40, 10)
    stored |= {f"{k}_train": np.concatenate([stored[f"{k}_train"]] * 5) for k in "xy"}
    bundle = load_data(write_npz(tmp_path / "d.npz", **stored), validation=20)
    assert len(bundle.validation) == 20 and len(as_rows(bundle.validation)) == 4
    assert not as_rows(bundle.train) & as_rows(bundle.validation)
    stored["x_train"][:] = stored["x_train"][0]
    with pytest.raises(UsageError, match=r"cannot hold out 20 of 200 .*: only 1 of them are different"):
        load_data(write_npz(tmp_path / "d.npz", **stored), validation=20)


def test_a_class_with_a_single_image_stays_in_training(tmp_path: Path) -> None:
    class_folders(tmp_path, 12)
    write(tmp_path / "c" / "only.png", noise(50))
    write(tmp_path / "c" / "copy.png", noise(50))
    bundle = load_data(tmp_path, validation=1)
    assert f"{tmp_path.name}: test: no image is of the class c" in bundle.notes
    assert bytes(noise(50).transpose(2, 0, 1).tobytes()) not in as_rows(bundle.test)


def test_images_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"c{i}" / "0.png", noise(i))
    with pytest.raises(UsageError, match="test: there are no images"):
        load_data(tmp_path)


def test_files_are_compared_as_far_as_it_takes(tmp_path: Path) -> None:
    contents = [b"a" * 9000, b"a" * 8999 + b"b", b"a" * 9000, b"b" * 9000, b"short", b"a" * 9000 + b"a", b"other"]
    paths = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    keys = file_keys(paths)
    assert keys[0] == keys[2] and len(set(keys)) == 6


def test_parts_of_other_kinds_are_not_compared() -> None:
    class Foreign:
        def __len__(self) -> int:
            return 8

        def get(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(indices), 3, 4, 4, dtype=torch.uint8), indices % 2

    images = Foreign()
    bundle = DataBundle("mine", images, images, images, ("a", "b"), (0.5,) * 3, (0.5,) * 3, (3, 4, 4))
    assert finished(bundle, None) == bundle
    none = TensorImages(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0).long())
    with pytest.raises(UsageError, match="mine has no test images"):
        finished(replace(bundle, test=none), None)
