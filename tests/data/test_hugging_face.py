"""Data sets of Hugging Face's library, as files and as objects."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.data_files import as_rows, everything, write_class_folders
from PIL import Image

import robust_prune as rp
from robust_prune.data import hugging_face
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.introspect.fingerprint import images_hash

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pictures(count: int, seed: int, grey: bool = False, sizes: bool = False) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    shapes = ((8 + 2 * (i % 3) * sizes, 8) + (() if grey else (3,)) for i in range(count))
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def table(count: int = 12, seed: int = 0, extra: dict[str, Any] | None = None, **form: bool) -> Any:
    kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])} | (extra or {})
    columns: dict[str, Any] = {"img": pictures(count, seed, **form)}
    columns |= {name: [i % 3 for i in range(count)] for name in kinds if name != "img"}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def pair(**form: bool) -> Any:
    return datasets.DatasetDict(train=table(30, 1, **form), test=table(9, 2, **form))


def as_clone(both: Any, folder: Path, pattern: str = "data/{}-00000-of-00001.parquet") -> Path:
    for part, rows in both.items():
        file = folder / pattern.format(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(file))
    return folder


@pytest.mark.parametrize("form", ["object", "saved", "clone", "converted"])
def test_the_same_images_come_in_from_every_form(tmp_path: Path, form: str) -> None:
    both, source = pair(), tmp_path / "pets"
    if form == "saved":
        both.save_to_disk(str(source))
    elif form == "clone":
        as_clone(both, source)
        (source / "README.md").write_text("cats and more")
    elif form == "converted":
        as_clone(both, source, "default/{}/0000.parquet")
    bundle = rp.load_data(both if form == "object" else source, validation=3)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (27, 3, 9)
    assert bundle.class_names == ("ant", "bee", "cat") and bundle.input_size == (3, 8, 8) and bundle.notes == ()
    images, labels = everything(bundle.test)
    assert labels.tolist() == [0, 1, 2] * 3
    assert torch.equal(images, torch.from_numpy(np.stack([np.asarray(x) for x in pictures(9, 2)])).permute(0, 3, 1, 2))


def test_a_single_file_is_split(tmp_path: Path) -> None:
    table(40).to_parquet(str(tmp_path / "pets.parquet"))
    bundle = rp.load_data(tmp_path / "pets.parquet", validation=3)
    parts = [as_rows(part) for part in (bundle.train, bundle.validation, bundle.test)]
    assert len(parts[2]) == 9 and len(set.union(*parts)) == sum(map(len, parts)) == 40
    assert "has no test split: 9 of its images were set aside" in bundle.notes[0]


def test_large_ones_are_decoded_on_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "IN_MEMORY_BYTES", 0)
    both = pair(sizes=True)
    bundle = rp.load_data(both, validation=3, image_size=8)
    assert isinstance(bundle.test, hugging_face.RowImages) and bundle.input_size == (3, 8, 8)
    assert bundle.test.get(torch.tensor([4, 0]))[0].shape == (2, 3, 8, 8)
    both["test"] = datasets.concatenate_datasets([both["test"], both["train"].select([5])])
    with pytest.raises(UsageError, match=r"1 of 10 test images .* such as row 9 of img and row 5 of img"):
        rp.load_data(both)


def test_every_image_of_a_large_table_counts_for_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "IN_MEMORY_BYTES", 0)
    test = rp.load_data(pair(sizes=True), validation=3, image_size=8).test
    assert isinstance(test, hugging_face.RowImages)
    changed = replace(test, keys=(*test.keys[:4], b"another image", *test.keys[5:]))
    assert images_hash(test, sample=2) != images_hash(changed, sample=2), "the images at both ends are the same"


def test_grey_stays_grey_and_other_splits_take_their_roles() -> None:
    both = datasets.DatasetDict(train=table(30, 1, grey=True), validation=table(9, 2, grey=True), extra=table(3))
    bundle = rp.load_data(both, validation=3, image_size=16)
    assert bundle.input_size == (1, 16, 16) and len(bundle.test) == 9
    assert bundle.notes == ("the split extra was left out",)
    bundle = rp.load_data(datasets.DatasetDict(both, test=table(6, 3, grey=True), extra=table(3)))
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (30, 9, 6)


def test_columns_are_found_by_type_or_by_usual_names(tmp_path: Path) -> None:
    def png(image: Image.Image) -> bytes:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

    for cell in (png, lambda image: {"bytes": png(image), "path": None}):
        both = {
            part: datasets.Dataset.from_dict({"image": [cell(x) for x in pictures(n, n)], "label": [0, 1] * (n // 2)})
            for part, n in (("train", 20), ("test", 8))
        }
        bundle = rp.load_data(both, validation=2)
        assert bundle.class_names == ("0", "1") and bundle.input_size == (3, 8, 8)


def test_what_is_unclear_is_refused(tmp_path: Path) -> None:
    other = datasets.ClassLabel(names=["x", "y", "z"])
    fine = {"label": other, "coarse": other}
    text = table().remove_columns("label").add_column("label", ["ant", "bee", "cat"] * 4)
    unlabelled = table().remove_columns("label")
    hidden = table().remove_columns("label").add_column("label", [-1] * 12)
    cases: list[tuple[Any, str]] = [
        (
            {"train": table(12, 1, fine), "test": table()},
            "train has several columns of labels: label, coarse. Keep one",
        ),
        ({"train": text, "test": text}, "no column of labels; its columns are img, label. Labels of text"),
        ({"train": unlabelled, "test": table()}, "no column of labels; its columns are img"),
        ({"train": table().remove_columns("img"), "test": table()}, "no column of images; its columns are label"),
        ({"train": table(12, 1), "test": hidden}, "test: column label holds the negative label -1"),
        ({"train": table(12, 1), "test": table(0)}, "the split test is empty"),
        ({"first": table(), "test": table(12, 1)}, "has no split train; found first, test"),
        ({"train": table(12, 1), "test": table(12, 2, {"label": other})}, "the classes of test, .* not those"),
        ({"train": table(12, 1).to_iterable_dataset(), "test": table()}, "is a IterableDataset, which has no length"),
        ({"train": table(12, 1), "test": table(12, 1)}, "12 of 12 test images are images of the training part"),
        (table(), "a single split has no test images"),
    ]
    for source, words in cases:
        with pytest.raises(UsageError, match=words) as raised:
            rp.load_data(source)
        assert "\n" not in str(raised.value)


def test_files_that_are_wrong_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = as_clone(pair(), tmp_path / "several", "plain/{}-0.parquet")
    as_clone(pair(), several, "cropped/{}-0.parquet")
    with pytest.raises(UsageError, match=r"has files of test in cropped, plain. Give one of these folders"):
        rp.load_data(several)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"torn\.parquet cannot be read as a Hugging Face data set: ") as raised:
        rp.load_data(tmp_path / "torn.parquet")
    assert "\n" not in str(raised.value)
    for index in range(8):
        path = tmp_path / "folders" / ("train", "test")[index // 4] / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures(8, 3)[index].save(path)
    (tmp_path / "folders" / "boxes.parquet").write_bytes(b"of something else")
    assert len(rp.load_data(tmp_path / "folders", validation=1).test) == 4
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r'pip install "robust-prune\[hf\]"'):
        rp.load_data(tmp_path / "torn.parquet")


def as_shards(folder: Path, parts: Mapping[str, int], **other: bytes) -> Path:
    """Shards of WebDataset: for each part one with so many random images of three classes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in parts.items():
        with tarfile.open(folder / name, "w") as shard:
            for number in range(count):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(picture, "PNG")
                members = {"png": picture.getvalue(), "cls": str(number % 3).encode(), **other}
                for suffix, contents in members.items():
                    info = tarfile.TarInfo(f"{number:04}.{suffix}")
                    info.size = len(contents)
                    shard.addfile(info, io.BytesIO(contents))
    return folder


def test_shards_of_webdataset_are_read_by_their_names(tmp_path: Path) -> None:
    shards = as_shards(tmp_path / "toy", {"toy-train-0000.tar": 20, "toy-train-0001.tar": 10, "toy-val-0000.tar": 9})
    bundle = rp.load_data(shards, validation=3)
    assert (len(bundle.train) + len(bundle.validation), len(bundle.test)) == (30, 9)
    assert bundle.input_size == (3, 20, 24) and bundle.class_names == ("0", "1", "2")
    _, labels = bundle.test.get(torch.arange(9))
    assert labels.tolist() == [0, 1, 2] * 3
    with tarfile.open(shards / "toy-val-0000.tar") as shard:
        stored = shard.extractfile("0004.png")
        assert stored is not None
        wanted = np.asarray(Image.open(io.BytesIO(stored.read())))
    shown = {image.permute(1, 2, 0).numpy().tobytes() for image in bundle.test.get(torch.arange(9))[0]}
    assert wanted.tobytes() in shown


def test_an_archive_beside_the_folders_of_its_images_is_not_read(tmp_path: Path) -> None:
    as_shards(tmp_path, {"everything.tar": 3})
    write_class_folders(tmp_path, side=8)
    assert rp.load_data(tmp_path, validation=1).class_names == ("a", "b")


def test_pickles_in_shards_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return print, ("code of a stranger ran",)

    hostile = pickle.dumps(Hostile(), protocol=2)
    for suffix in ("pyd", "pickle", "pth", "npy"):
        shards = as_shards(tmp_path / suffix, {"train-0.tar": 9, "test-0.tar": 6}, **{suffix: hostile})
        with contextlib.suppress(UsageError):
            rp.load_data(shards, validation=1)
    assert "stranger" not in capsys.readouterr().out


def add(shard: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    shard.addfile(info, io.BytesIO(contents))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as raised:
        rp.load_data(path, validation=1)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("harm", ["cut", "zeros", "noise", "joined"])
def test_a_shard_that_ends_early_is_refused(harm: str, tmp_path: Path) -> None:
    """`tarfile` takes a damaged header for the end, and the rest would be left out."""
    shard = as_shards(tmp_path, {"toy.tar": 9}) / "toy.tar"
    with tarfile.open(shard) as opened:
        at = opened.getmembers()[8].offset
    contents = bytearray(shard.read_bytes())
    if harm == "joined":
        contents += bytes(contents)
    elif harm == "cut":
        del contents[at:]
    else:
        contents[at : at + 512] = b"\0" * 512 if harm == "zeros" else b"\xa5" * 512
    shard.write_bytes(contents)
    assert refused(shard) == f"{shard} is damaged, or ends before its end. Make it again."


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.png": b"x"}, "the sample a has png and no cls. Expected 0001.cls"),
        ({"a.cls": b"0"}, "the sample a has 0 images (cls). Expected 0001.cls"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"0"}, "the sample a has 2 images (png, jpg, cls)"),
        ({"a.png": b"x", "a.cls": b"0", "b.jpg": b"x", "b.cls": b"1"}, "the sample b a .jpg file. Store images"),
        ({"a.png": b"x", "a.cls": b"cat"}, "a.cls holds b'cat'. Expected 0001.cls, which holds the number"),
        ({"a.cls": b"0", "b.cls": b"1", "a.png": b"x"}, "the sample a has 0 images (cls)"),
        ({}, "toy.tar holds no images. Remove it."),
    ],
)
def test_odd_samples_of_shards_are_named(members: dict[str, bytes], said: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "toy.tar", "w") as shard:
        for name, contents in members.items():
            add(shard, name, contents)
    assert said in refused(tmp_path / "toy.tar")


def test_shards_of_any_case_and_name_are_read(tmp_path: Path) -> None:
    folder = as_shards(tmp_path / "odd[1]*", {"train-0.tar": 12, "train-1.TAR": 9, "TEST-0.TAR": 6})
    bundle = rp.load_data(folder, validation=3)
    assert (len(bundle.train) + 3, len(bundle.test)) == (21, 6)
    assert len(rp.load_data(as_shards(tmp_path, {"x[0-9].tar": 15}) / "x[0-9].tar", validation=1).class_names) == 3
    assert "has '::' in its name" in refused(as_shards(tmp_path, {"a::b.tar": 9}) / "a::b.tar")


def test_other_splits_are_held_against_the_training_part_whatever_their_names(tmp_path: Path) -> None:
    shards = as_shards(tmp_path, {"data-test-0.tar": 2, "data-train-0.tar": 12})
    assert rp.load_data(shards, validation=3).class_names == ("0", "1", "2")
    shards = as_shards(tmp_path / "more", {"data-train-0.tar": 2, "data-test-0.tar": 12})
    assert "more: test holds the label 2" in refused(shards)


def test_an_archive_that_holds_no_shard_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.tar").write_bytes(b"no archive")
    assert "torn.tar cannot be read as a shard of WebDataset: " in refused(tmp_path / "torn.tar")
