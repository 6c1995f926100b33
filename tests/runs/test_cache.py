"""The cache of results that runs share: what is found again, what is not, and what damage and limits do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from robust_prune import cli
from robust_prune.job import Length
from robust_prune.runs import cache as caching
from robust_prune.runs import parts as storing
from robust_prune.runs.cache import Cache, cache_folder
from robust_prune.runs.run import Run


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


class Made:
    """Makes lengths, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Length:
        self.times += 1
        return Length(3, self.times)


def test_a_result_is_computed_once_for_the_same_inputs_code_and_libraries(
    store: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made()
    first = store.value("length", Length, ["model", 1], made)
    assert Cache(store.folder).value("length", Length, ["model", 1], made) == first == Length(3, 1)
    assert store.value("length", Length, ["model", 2], made) == Length(3, 2)
    assert store.value("width", Length, ["model", 1], made) == Length(3, 3)
    monkeypatch.setattr(caching, "_surroundings", lambda: "another version")
    assert store.value("length", Length, ["model", 1], made) == Length(3, 4)


def test_tensors_come_back_as_they_were(store: Cache) -> None:
    wanted = {"a": torch.randn(3, 4, dtype=torch.float64).t(), "b": torch.arange(5)}
    store.tensors("tensors", [], lambda: wanted)
    found = store.tensors("tensors", [], lambda: pytest.fail("they are stored"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found["a"].dtype == torch.float64


def _edit_record(folder: Path) -> None:
    record = folder / "entry.json"
    record.write_text(record.read_text().replace('"epochs": 3', '"epochs": 4'))


def _link_file(folder: Path) -> None:
    tensors = folder / "tensors.safetensors"
    copy = folder.parent.parent / "copy"
    copy.write_bytes(tensors.read_bytes())
    tensors.unlink()
    tensors.symlink_to(copy)


@pytest.mark.parametrize(
    "damage",
    [
        _edit_record,
        lambda folder: (folder / "entry.json").write_text("{"),
        lambda folder: (folder / "entry.json").write_text("[]"),
        lambda folder: (folder / "tensors.safetensors").write_bytes(b"other"),
        lambda folder: (folder / "tensors.safetensors").unlink(),
        _link_file,
    ],
    ids=["record", "no JSON", "no record", "file", "no file", "link"],
)
def test_a_damaged_entry_is_named_and_its_result_computed_again(
    damage: object, store: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage) and store.folder is not None
    kept = store.folder / "0123456789abcdef"

    def both() -> tuple[Length, dict[str, torch.Tensor]]:
        return store.value("length", Length, [], made), store.tensors(
            "tensors", [], lambda: {"t": torch.ones(made.times)}
        )

    made = Made()
    both()
    for folder in [path for path in store.folder.iterdir() if path != kept]:
        if (folder / "tensors.safetensors").exists() or damage in (_edit_record,):
            damage(folder)
    length, tensors = both()
    text = capsys.readouterr().out.replace("\n", " ")
    assert "in the cache is damaged. Its result, " in text and "computed again" in " ".join(text.split())
    again = both()
    assert again[0] == length and torch.equal(again[1]["t"], tensors["t"]), "the new entries are whole"


@pytest.mark.parametrize("kind", ["half removed", "file", "link"])
def test_what_is_no_entry_makes_room_for_one(kind: str, store: Cache, tmp_path: Path) -> None:
    made = Made()
    store.value("length", Length, [], made)
    assert store.folder is not None
    (folder,) = store.folder.iterdir()
    if kind == "half removed":
        (folder / "entry.json").unlink()
        (folder / "dense.onnx").write_text("left")
    else:
        shutil.move(folder, tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere") if kind == "link" else folder.write_text("left")
    assert store.value("length", Length, [], made) == Length(3, 2) == store.value("length", Length, [], made)
    assert kind != "link" or (tmp_path / "elsewhere" / "entry.json").exists()
    assert store.shrink(0) == 1 and list(store.folder.iterdir()) == []


def test_a_record_of_absurd_numbers_is_damaged(store: Cache) -> None:
    made = Made()
    store.value("length", Length, [], made)
    (entry,) = store.entries()
    record = entry.folder / "entry.json"
    record.write_text(record.read_text().replace('"seconds": ', '"seconds": 1' + 400 * "0" + ', "s": '))
    assert store.entries() == [] and store.value("length", Length, [], made) == Length(3, 2)


def test_those_not_used_for_longest_go_when_the_limit_is_exceeded(tmp_path: Path) -> None:
    store = Cache(tmp_path, limit=8 * 4096)
    for number in range(12):
        store.tensors("tensors", [number], lambda: {"t": torch.zeros(800)})  # more than 3,200 bytes
        for age, entry in enumerate(store.entries()):
            os.utime(entry.folder / "entry.json", (1e9 - age, 1e9 - age))
        assert store.find("tensors", [0]) is not None, "it was used last"
    left = [number for number in range(12) if store.find("tensors", [number]) is not None]
    assert 0 in left and 11 in left and 3 <= len(left) < 12
    store.tensors("large", [], lambda: {"t": torch.zeros(2000)})
    assert store.find("large", []) is None, "it exceeds an eighth of the limit"


def test_without_a_folder_that_can_be_written_results_are_computed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for store in (Cache(), Cache(file), Cache(file / "below")):
        made = Made()
        assert [store.value("length", Length, [], made).images for _ in range(2)] == [1, 2]
        assert store.entries() == [] and store.shrink(0) == 0
    assert file.read_text() == "mine"


def test_a_name_or_the_environment_chooses_the_folder_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_PRUNE_CACHE", "/named")
    assert cache_folder() == Path("/named") and Cache.named("none") == Cache()
    assert Cache.named("/other").folder == Path("/other/stages")
    monkeypatch.setenv("ROBUST_PRUNE_CACHE", "none")
    assert cache_folder() is None and Cache.named() == Cache()
    monkeypatch.delenv("ROBUST_PRUNE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "robust-prune"


def test_a_python_object_shares_nothing(store: Cache) -> None:
    assert store.of_model("object/Net-0123") == Cache() and store.of_model("cifar/resnet20") is store


def test_parts_last_until_the_computation_succeeds(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "WORK_FOR_WRITING", 0.0)
    with pytest.raises(KeyboardInterrupt), storing.parts(store, "sum", [1]) as parts:
        for number in (1, 2, 3):
            parts.step("loss", number, {"sum": torch.tensor([float(number)])})
        parts.put("direction", {"d": torch.ones(2)})
        raise KeyboardInterrupt
    with storing.parts(store, "sum", [2]) as other:
        assert other.last("loss", 9) == (0, {}) and other.get("direction") is None
    with storing.parts(store, "sum", [1]) as parts:
        number, tensors = parts.last("loss", 9)
        assert number == 3 and tensors["sum"].item() == 3
        assert parts.get("direction") is not None and len(store.entries()) == 2
    assert store.entries() == []


def test_parts_are_not_stored_more_often_than_it_pays(store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "WORK_FOR_WRITING", 1e9)
    with pytest.raises(KeyboardInterrupt), storing.parts(store, "sum", []) as parts:
        for number in (1, 2, 3):
            parts.step("loss", number, {"sum": torch.ones(1)})
        raise KeyboardInterrupt
    with storing.parts(store, "sum", []) as parts:
        assert parts.last("loss", 9)[0] == 1


def test_a_stage_of_another_run_gives_its_result_and_its_files(
    store: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Made()

    def run(name: str, *reuse: str) -> tuple[Length, bytes]:
        titles = {"export": "Export"}
        run = Run(tmp_path / name, name, stages=titles, cache=store)
        file = run.folder / "dense.onnx"

        def make() -> Length:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"file {made.times}".encode())
            return made()

        return run.stage("export", Length, [], make, files=[file], reuse=reuse), file.read_bytes()

    first = run("one", "model")
    assert run("two", "model") == first and "Export (from the cache)" in capsys.readouterr().out
    assert run("two", "model") == first and "Export (from an earlier run)" in capsys.readouterr().out
    assert run("three", "another model") == (Length(3, 2), b"file 1")
    (tmp_path / "two" / "dense.onnx").write_bytes(b"damaged")
    assert run("two", "model") == first, "the cache mends a damaged run"
    (entry,) = (entry for entry in store.entries() if entry.value == {"epochs": 3, "images": 1})
    (entry.folder / "dense.onnx").write_bytes(b"damaged")
    assert run("four", "model") == (Length(3, 3), b"file 2")


def test_the_results_are_listed_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Cache.named(tmp_path).value("Sensitivity", Length, [], Made())
    cli.main(["cache", "ls", "--cache", str(tmp_path)])
    said = capsys.readouterr().out
    assert "Sensitivity" in said and "1 result, " in said
    cli.main(["cache", "clear", "--cache", str(tmp_path)])
    assert "1 result removed from" in capsys.readouterr().out
    cli.main(["cache", "ls", "--cache", str(tmp_path)])
    assert "0 results, 0 bytes of at most 4.29 GB" in " ".join(capsys.readouterr().out.split())
    cli.main(["cache", "ls", "--cache", "none"])
    assert "switched off" in capsys.readouterr().out
