"""Images from folders."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.data_files import everything, write_npz
from PIL import Image

from robust_prune.data.base import DataBundle, ImageSet
from robust_prune.data.images import Form, decode
from robust_prune.data.sources import load_data
from robust_prune.errors import UsageError


def paint(path: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def class_folders(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> None:
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            # Images of different parts differ, too.
            paint(root / name / f"{index}.png", (label * 50, index, sum(root.name.encode()) % 251), size)


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
    bundle = load_data(tmp_path, validation=1, image_size=10)
    images, _ = bundle.test.get(torch.arange(6))
    assert images.shape == (6, 3, 10, 10) and images.dtype == torch.uint8
    assert (images[..., 1:-1].amin((1, 2, 3)) == 255).sum() == 1


def test_sixteen_bits_are_scaled_and_other_depths_refused(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(decode(tmp_path / "deep.png", "deep", Form((1, 8, 8)))[0], ramp // 257)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(UsageError, match=r"cannot decode the image real\.tif: mode F has 32 bits"):
        decode(tmp_path / "real.tif", "real.tif", Form((1, 8, 8)))


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    Image.new("1", (15_000, 15_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    with pytest.raises(UsageError, match=r"cannot decode the image bomb\.png: .*exceeds limit"):
        decode(tmp_path / "bomb.png", "bomb.png", Form((3, 32, 32)))


@pytest.mark.skipif(sys.platform == "win32", reason="the planted program is a shell script")
def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/RAN\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n")
    with pytest.raises(UsageError, match=r"cannot decode the image a\.png"):
        decode(tmp_path / "a.png", "a.png", Form((3, 16, 16)))
    assert not (tmp_path / "RAN").exists()
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(UsageError, match=r"cannot decode the image b\.png: it is missing, or no file"):
        decode(tmp_path / "b.png", "b.png", Form((3, 16, 16)))


def test_a_narrow_image_is_cropped_before_it_is_enlarged(tmp_path: Path) -> None:
    Image.new("L", (1, 20_000), 255).save(tmp_path / "narrow.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (decode(tmp_path / "narrow.png", "narrow", Form((1, 224, 224))) == 255).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # 100 MB


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
                paint(tmp_path / part / name / f"{index}.png", 40 * index + (part == "test") + 5 * (name == "bee"))
    bundle = load_data(tmp_path, validation=1)
    assert bundle.input_size == (1, 10, 12)
    assert sorted(everything(bundle.test)[0][:, 0, 0, 0].tolist()) == [1, 6, 41, 46, 81, 86]
    assert load_data(tmp_path, validation=1, image_size=32).input_size == (1, 32, 32)


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


def test_hidden_and_unknown_files_are_no_data_and_are_counted(tmp_path: Path) -> None:
    home = tmp_path / ".cache" / "data"
    for part in ("train", "test"):
        class_folders(home / part, {"ant": 6, "bee": 5})
        for name in (".ipynb_checkpoints", "__MACOSX"):
            paint(home / part / "ant" / name / "0-copy.png", (0, 200, 1))
            paint(home / part / name / "ant" / "0.png", (0, 201, 1))
        (home / part / "bee" / "._0.png").write_bytes(b"\0\5\x16\7")
        (home / part / "bee" / "Thumbs.db").write_bytes(b"thumbs")
        for i in range(3):
            (home / part / "bee" / f"notes{i}.TXT").write_text("words")
    (home / "train" / "bee" / "README").write_text("words")
    (home / "train" / "bee" / "gone.png").symlink_to("nowhere.png")
    (home / "train" / "bee" / "round").symlink_to(home / "train" / "bee")
    (home / "train" / "bee" / "above").symlink_to(home / "train")
    paint(home / "train" / "stray.png", (1, 1, 1))
    (home / "test" / "ant" / "0.png").rename(home / "test" / "ant" / "0.PNG")
    bundle = load_data(home, validation=2)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (9, 2, 11)
    assert bundle.class_names == ("ant", "bee")
    assert bundle.notes == (
        "21 files were skipped: 12 hidden, 6 .txt, 1 linked to nothing, 1 outside class folders, 1 without suffix",
    )


def test_a_linked_folder_of_images_is_followed(tmp_path: Path) -> None:
    class_folders(tmp_path / "elsewhere", {"more": 3})
    for part in ("train", "test"):
        class_folders(tmp_path / "data" / part, {"ant": 3, "bee": 3})
    (tmp_path / "data" / "train" / "ant" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    assert len(load_data(tmp_path / "data", validation=1).train) == 8


@pytest.mark.parametrize(
    ("names", "natural"),
    [
        (("0", "1", "10", "2"), ("0", "1", "2", "10")),
        (("a10", "a9", "b1"), ("a9", "a10", "b1")),
        (("B", "a"), ("a", "B")),
    ],
)
def test_the_order_of_classes_is_shown_and_chosen_where_readers_differ(
    tmp_path: Path, names: tuple[str, ...], natural: tuple[str, ...]
) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, dict.fromkeys(names, 3))
    text = load_data(tmp_path, validation=1)
    assert text.class_names == names
    mapping = ", ".join(f"{name} → {index}" for index, name in enumerate(names))
    assert f"as by torchvision: {mapping}; data.class_order=natural" in text.notes[0]
    other = load_data(tmp_path, validation=1, class_order="natural")
    assert other.class_names == natural and "as by timm: " in other.notes[0]
    shown = {(text.class_names[y], x[0, 0, 0].item()) for x, y in zip(*everything(text.test), strict=True)}
    assert shown == {(other.class_names[y], x[0, 0, 0].item()) for x, y in zip(*everything(other.test), strict=True)}


def test_ten_numbered_classes_need_no_note(tmp_path: Path) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, dict.fromkeys("12345", 2))
    assert load_data(tmp_path, validation=1).notes == ()


def test_mixed_colours_and_transparency_are_said(tmp_path: Path) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, {"ant": 6, "bee": 5})
    paint(tmp_path / "test" / "ant" / "grey.png", 9)
    Image.new("RGBA", (12, 10), (9, 8, 7, 0)).save(tmp_path / "train" / "bee" / "glass.png")
    bundle = load_data(tmp_path, validation=1)
    assert bundle.input_size == (3, 10, 12)
    assert bundle.notes == (
        "1 of 24 images are grey and the others coloured: all are read as colour images",
        "1 of 24 images are partly transparent: their alpha channel is dropped",
    )


def test_folders_that_show_nothing_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for index in range(4):
            pixels = np.zeros((8, 8), np.uint8)
            pixels[index, 4 * (part == "test")] = 1
            (tmp_path / part / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / "ab"[index % 2] / f"{index}.png")
    with pytest.raises(UsageError, match="train images: only the values 0 and 1 occur"):
        load_data(tmp_path)


def test_layouts_that_are_nearly_right_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path / "inner" / "train", {"ant": 3, "bee": 3})
    with pytest.raises(UsageError, match=r"1 class folders; at least 2 are needed. Did you mean .*inner"):
        load_data(tmp_path)
    for part in ("val", "test"):
        class_folders(tmp_path / "held" / part, {"ant": 3, "bee": 3})
    with pytest.raises(UsageError, match="has test and val but no train"):
        load_data(tmp_path / "held")
    for part in ("train", "val", "validation", "test"):
        class_folders(tmp_path / "many" / part, {"ant": 3, "bee": 3})
    with pytest.raises(UsageError, match=r"has train, val, validation, test. Keep train, one for validation, and test"):
        load_data(tmp_path / "many")
    (tmp_path / "films" / "ant").mkdir(parents=True)
    (tmp_path / "films" / "ant" / "0.gif").write_bytes(b"GIF")
    class_folders(tmp_path / "films", {"bee": 3})
    with pytest.raises(UsageError, match=r"holds no images .*; found 1 \.gif"):
        load_data(tmp_path / "films")


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, {"ant": 3, "bee": 3})
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "val_annotations.txt").write_bytes(b"\xff\xfeimage\tant\n")
    with pytest.raises(UsageError, match=r"val_annotations.txt is not UTF-8 text"):
        load_data(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").unlink()
    (tmp_path / "val").rmdir()
    with pytest.raises(UsageError, match=r"data\.image_size resizes folders .* are 8x8"):
        load_data(write_npz(tmp_path / "d.npz"), image_size=16)

    with pytest.raises(UsageError, match=r"cannot read x+: File name too long"):
        load_data("x" * 5000)

    def forbidden(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(UsageError, match=r"cannot read .*train: Permission denied"):
        load_data(tmp_path)
