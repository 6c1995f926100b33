"""Files are written whole or not at all."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path

import pytest

from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.runs.files import atomic_write, atomic_writes, digest, finite, read_json, write_json, write_text


def test_files_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(Exception, match=r"cannot write .*disk full\. Free some space"):
        atomic_write(target, fail)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_several_files_are_written_or_none(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(part: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(EnvironmentProblem, match=r"cannot write .*b: disk full"):
        atomic_writes({tmp_path / "a": lambda part: part.write_text("new"), tmp_path / "b": fail})
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    atomic_writes({tmp_path / name: lambda part, name=name: part.write_text(name) for name in "ab"})
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["a", "b"]


def test_links_are_written_through_and_pipes_are_not_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(tmp_path / "there" / "real.json")
    for text in ("1", "2"):
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "there" / "real.json").read_text() == text
    os.mkfifo(pipe)
    for place in (pipe, Path(os.devnull), tmp_path):
        before = place.stat()
        with pytest.raises(UsageError, match=r"is a (device or a pipe|folder), not a file"):
            write_text(place, "x")
        assert place.stat().st_mode == before.st_mode


@pytest.mark.parametrize(
    "words", ["[enforce fail at inline_container.cc:664] . unexpected pos 64", "basic_ios::clear: iostream error"]
)
def test_a_full_disk_in_torchs_words_is_said_plainly(tmp_path, words):
    def fail(part: Path) -> None:
        raise RuntimeError(words)

    with pytest.raises(EnvironmentProblem, match=r"cannot write .*the disk is full.*Free some space"):
        atomic_write(tmp_path / "x.pt", fail)

    def bug(part: Path) -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake"):
        atomic_write(tmp_path / "x.pt", bug)


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "file.txt", "ä\n")
        os.umask(0o077)
        write_json(tmp_path / "deep" / "file.json", {"b": [1], "a": None})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "deep" / "file.json").stat().st_mode) == 0o600
    assert (tmp_path / "file.txt").read_text(encoding="utf-8") == "ä\n"
    assert read_json(tmp_path / "deep" / "file.json") == {"b": [1], "a": None}


def test_what_is_no_json_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(UsageError, match=r"torn\.json is not valid JSON"):
        read_json(tmp_path / "torn.json")


def test_a_digest_depends_on_the_values_alone():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1}) != digest({"a": 1, "b": [3, 2]})
    assert len(digest("x")) == 16


def test_numbers_that_are_not_finite_become_null_however_deep_they_lie():
    assert finite({"a": [math.inf, (1.5, math.nan)], "b": "nan", "c": 2}) == {
        "a": [None, [1.5, None]],
        "b": "nan",
        "c": 2,
    }
