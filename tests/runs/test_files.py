"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from robust_prune.errors import EnvironmentProblem
from robust_prune.runs.files import atomic_write


def test_files_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(Exception, match=r"cannot write .*disk full\. Free some space"):
        atomic_write(target, fail)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_in_torchs_words_is_said_plainly(tmp_path):
    def fail(part: Path) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with pytest.raises(EnvironmentProblem, match=r"cannot write .*Free some space"):
        atomic_write(tmp_path / "x.pt", fail)

    def bug(part: Path) -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake"):
        atomic_write(tmp_path / "x.pt", bug)
