"""Data from every source, made small and offline."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robust_prune.data import sample
from robust_prune.data.base import DataBundle, ImageSet, TensorImages, images_at_once
from robust_prune.data.class_names import BY_DATA
from robust_prune.data.folder import decode
from robust_prune.data.npz import load_npz
from robust_prune.data.sources import load_data
from robust_prune.errors import EnvironmentProblem, UsageError


def everything(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return images.get(torch.arange(len(images)))


def as_rows(images: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(images)[0]}


def arrays(train: int = 40, test: int = 10, side: int = 8, grey: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (side, side) if grey else (side, side, 3)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train, dtype=np.uint8) % 4,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test, dtype=np.int64) % 4,
    }


def write_npz(path: Path, **changes: Any) -> Path:
    np.savez(path, **{k: v for k, v in (arrays() | changes).items() if v is not None})
    return path


# ---------------------------------------------------------------------------------------------- .npz


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
        ({"x_train": NAN}, "x_train must be uint8 in 0..255, got float32"),
        ({"x_train": BAD["x_train"].transpose(0, 3, 1, 2)}, r"must be \[N, H, W, C\]"),
        ({"x_test": BAD["x_test"][:, :4]}, "x_train holds images of"),
        ({"y_train": BAD["y_train"][:-1]}, "40 images in x_train but 39 labels"),
        ({"y_train": BAD["y_train"].astype(float)}, "must hold integers"),
        ({"y_train": BAD["y_train"].astype(int) - 1}, "negative label -1"),
        ({"y_test": BAD["y_test"] + 5}, "y_test holds the label 8, y_train goes to 3 only"),
        ({"x_test": BAD["x_test"][:0], "y_test": BAD["y_test"][:0]}, "holds no images"),
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


# ---------------------------------------------------------------------------------------------- known names


def test_a_prepared_npz_is_taken_for_a_known_name(tmp_path: Path) -> None:
    write_npz(tmp_path / "cifar10.npz")
    bundle = load_data("cifar10", root=tmp_path)
    assert bundle.name == "cifar10" and bundle.class_names == BY_DATA["cifar10"]
    assert bundle.mean == (0.4914, 0.4822, 0.4465)


def test_the_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "svhn.npz")
    monkeypatch.setenv("ROBUST_PRUNE_DATA", str(tmp_path))
    assert load_data("svhn").class_names == tuple("0123456789")


@pytest.mark.parametrize("name", sorted(BY_DATA))
def test_offline_is_an_environment_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tried: list[str] = []

    def offline(url: Any, *_: Any, **__: Any) -> None:
        tried.append(str(url))
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(EnvironmentProblem, match=f"{name} is not in .* and cannot be downloaded") as raised:
        load_data(name, root=tmp_path)
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value) and f"{name}.npz" in str(raised.value)
    assert tried


def test_cifar10_in_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(BY_DATA["cifar10"])}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: Path(path).exists())
    bundle = load_data("cifar10", root=tmp_path, validation=10)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (90, 10, 20)
    raw = pickle.loads((folder / "test_batch").read_bytes())["data"]
    assert torch.equal(everything(bundle.test)[0], torch.from_numpy(raw).view(20, 3, 32, 32))


def test_fashion_mnist_keeps_one_channel(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes((2049).to_bytes(4, "big") + count.to_bytes(4, "big") + labels)
    bundle = load_data("fashion_mnist", root=tmp_path, validation=5)
    assert bundle.input_size == (1, 28, 28) and len(bundle.train) == 25
    assert torch.equal(everything(bundle.test)[0][:, 0], torch.from_numpy(images))


# ---------------------------------------------------------------------------------------------- folders


def paint(path: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def class_folders(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> None:
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            paint(root / name / f"{index}.png", (label * 50, index, 7), size)


def colours(bundle: DataBundle, images: ImageSet) -> list[tuple[str, int]]:
    """(class, number) of each image, read back from the pixels and checked against the label."""
    pixels, labels = everything(images)
    assert (pixels[:, 0, 0, 0] // 50 == labels).all()
    return [(bundle.class_names[label], int(x[1, 0, 0])) for x, label in zip(pixels, labels.tolist(), strict=True)]


@pytest.mark.parametrize("held_out", ["val", "valid", "test"])
def test_train_and_a_held_out_folder(tmp_path: Path, held_out: str) -> None:
    class_folders(tmp_path / "train", {"ant": 6, "bee": 5})
    class_folders(tmp_path / held_out, {"ant": 2, "bee": 3})
    bundle = load_data(tmp_path, validation=2)
    assert bundle.class_names == ("ant", "bee") and bundle.input_size == (3, 10, 12) and bundle.notes == ()
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (9, 2, 5)
    assert sorted(colours(bundle, bundle.test)) == [("ant", 0), ("ant", 1), ("bee", 0), ("bee", 1), ("bee", 2)]


def test_val_beside_test_is_the_validation_part(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"ant": 6, "bee": 5})
    class_folders(tmp_path / "val", {"ant": 1, "bee": 1})
    class_folders(tmp_path / "test", {"ant": 2, "bee": 3})
    bundle = load_data(tmp_path, validation=4)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (11, 2, 5)


def test_bare_class_folders_are_split_and_the_note_says_so(tmp_path: Path) -> None:
    class_folders(tmp_path, {"ant": 20, "bee": 10})
    bundle = load_data(tmp_path, validation=3, seed=4)
    train, held, test = (set(colours(bundle, part)) for part in (bundle.train, bundle.validation, bundle.test))
    assert len(train | held | test) == 30 == len(train) + len(held) + len(test)
    assert sorted(name for name, _ in test) == ["ant"] * 4 + ["bee"] * 2
    assert "6 of its images were set aside under seed 4" in bundle.notes[0]
    assert set(colours(bundle, load_data(tmp_path, seed=4).test)) == test
    assert set(colours(bundle, load_data(tmp_path, seed=5).test)) != test


def test_images_are_resized_on_the_shorter_side_and_cropped_in_the_centre(tmp_path: Path) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, {"ant": 3, "bee": 3}, size=(40, 20))
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 255
    Image.fromarray(wide).save(tmp_path / "test" / "ant" / "0.png")
    bundle = load_data(tmp_path, validation=1, input_size=(3, 10, 10))
    images, _ = bundle.test.get(torch.arange(6))
    assert images.shape == (6, 3, 10, 10) and images.dtype == torch.uint8
    assert (images[..., 1:-1].amin((1, 2, 3)) == 255).sum() == 1


def test_the_first_images_of_sorted_data_are_of_all_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, dict.fromkeys(("ant", "bee", "cat"), 12))
    bundle = load_data(tmp_path, validation=4)
    assert len(set(bundle.test.get(torch.arange(12))[1].tolist())) == 3
    y = bundle.test.get(torch.arange(len(bundle.test)))[1]
    assert y.bincount().tolist() == [12, 12, 12]
    again = load_data(tmp_path, validation=4)
    assert torch.equal(again.test.get(torch.arange(36))[1], y)
    path = write_npz(tmp_path / "d.npz", y_test=np.sort(arrays()["y_test"]))
    found = load_data(path, validation=10).test
    assert not torch.equal(found.labels, found.labels.sort().values)
    assert load_data(write_npz(tmp_path / "e.npz"), validation=10).test.labels.tolist() == arrays()["y_test"].tolist()


def test_sixteen_bits_are_scaled_and_other_depths_refused(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(decode(tmp_path / "deep.png", (1, 8, 8))[0], ramp // 257)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(UsageError, match=r"cannot decode the image .*real\.tif: mode F has 32 bits"):
        decode(tmp_path / "real.tif", (1, 8, 8))


def test_mixed_sizes_get_a_default_and_a_note(tmp_path: Path) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, {"ant": 3, "bee": 3})
    paint(tmp_path / "train" / "ant" / "big.png", (0, 9, 7), (50, 30))
    bundle = load_data(tmp_path, validation=1)
    assert bundle.input_size == (3, 224, 224)
    assert "differ in size" in bundle.notes[0]


def test_grey_folders_have_one_channel(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            for index in range(3):
                paint(tmp_path / part / name / f"{index}.png", 40 * index)
    bundle = load_data(tmp_path, validation=1)
    assert bundle.input_size == (1, 10, 12)
    assert sorted(everything(bundle.test)[0][:, 0, 0, 0].tolist()) == [0, 0, 40, 40, 80, 80]


def test_folder_mistakes(tmp_path: Path) -> None:
    def refuse(words: str) -> None:
        with pytest.raises(UsageError, match=words):
            everything(load_data(tmp_path, validation=1).test)

    refuse("0 class folders; at least 2")
    class_folders(tmp_path / "train", {"ant": 3, "bee": 3})
    refuse("none of val/")
    class_folders(tmp_path / "test", {"ant": 1, "cat": 1})
    refuse("has the class 'cat', which the training folder lacks")
    (tmp_path / "test" / "cat" / "0.png").unlink()
    (tmp_path / "test" / "cat").rmdir()
    (tmp_path / "train" / "bee2").mkdir()
    refuse("bee2 holds no images")
    (tmp_path / "train" / "bee2").rmdir()
    (tmp_path / "test" / "ant" / "0.png").write_text("not an image")
    refuse(r"cannot decode the image .*0.png")


def test_tiny_imagenet_layout(tmp_path: Path) -> None:
    for label, wnid in enumerate(("n01", "n02", "n03")):
        for index in range(4):
            paint(tmp_path / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", (label * 50, index, 0), (64, 64))
    for index, label in enumerate((2, 0, 1)):
        paint(tmp_path / "val" / "images" / f"val_{index}.JPEG", (label * 50, 0, 0), (64, 64))
    (tmp_path / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn03\t0\t0\t62\t62\nval_1.JPEG\tn01\t0\t0\t62\t62\nval_2.JPEG\tn02\t0\t0\t62\t62\n"
    )
    (tmp_path / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn99\tother\n")
    bundle = load_data(tmp_path, validation=2)
    assert bundle.class_names == ("goldfish", "bullfrog", "n03") and bundle.input_size == (3, 64, 64)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (10, 2, 3)
    images, labels = everything(bundle.test)
    assert labels.tolist() == [2, 0, 1]
    assert (images[:, 0, 5, 5].int() - torch.tensor([100, 0, 50])).abs().max() <= 3
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG n03\n")
    with pytest.raises(UsageError, match=r"val_annotations.txt:1: expected"):
        load_data(tmp_path)


# ---------------------------------------------------------------------------------------------- the embedded sample


def test_the_embedded_sample() -> None:
    bundle = load_data("sample")
    assert bundle.sample and "indicative" in bundle.notes[0] and bundle.class_names == BY_DATA["cifar10"]
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (1800, 200, 500)
    for images, per_class in ((bundle.train, 180), (bundle.validation, 20), (bundle.test, 50)):
        assert everything(images)[1].bincount().tolist() == [per_class] * 10
    parts = [as_rows(part) for part in (bundle.train, bundle.validation, bundle.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 2500
    mean = everything(bundle.train)[0].float().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx(bundle.mean, abs=0.02)


def test_sample_positions_are_distinct_and_inside_the_official_splits() -> None:
    stored = sample.read_arrays()
    for part, total in (("train", 50_000), ("test", 10_000)):
        index = stored[f"index_{part}"]
        assert len(index) == len(np.unique(index)) == len(stored[f"x_{part}"])
        assert index.min() >= 0 and index.max() < total


@pytest.mark.slow
def test_sample_equals_the_official_images() -> None:
    path = Path.home() / ".cache" / "robust-prune-data" / "cifar10.npz"
    if not path.is_file():
        pytest.skip("needs the whole of CIFAR-10 as .npz")
    stored, whole = sample.read_arrays(), np.load(path)
    for part in ("train", "test"):
        index = stored[f"index_{part}"]
        assert np.array_equal(whole[f"x_{part}"][index], stored[f"x_{part}"])
        assert np.array_equal(whole[f"y_{part}"][index], stored[f"y_{part}"])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), side=st.integers(1, 6), high=st.sampled_from([2, 16, 256]))
def test_the_samples_coding_is_lossless(seed: int, count: int, side: int, high: int) -> None:
    rng = np.random.default_rng(seed)
    images = (rng.integers(0, high, (count, side, side, 3)) * (255 // (high - 1))).astype(np.uint8)
    assert np.array_equal(sample.decode(sample.encode(images), count, side), images)


@pytest.mark.parametrize(("side", "count"), [(32, 256), (64, 256), (96, 113), (224, 20), (1024, 4)])
def test_fewer_large_images_are_attacked_at_once(side: int, count: int) -> None:
    images = TensorImages(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    assert images_at_once(images) == count
    assert images_at_once(images, 4) == 4


def test_a_damaged_sample_is_an_environment_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "sample").mkdir(parents=True)
    monkeypatch.setattr(sample.resources, "files", lambda _: tmp_path)
    with pytest.raises(EnvironmentProblem, match="Reinstall"):
        load_data("sample")
    (tmp_path / "data" / "sample" / sample.FILE).write_bytes(b"torn")
    with pytest.raises(EnvironmentProblem, match="Reinstall"):
        load_data("sample")
