"""What the terminal says of work that goes on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from builders.places import ROOT
from rich.console import Console
from rich.table import Table

from robust_prune import console as consoles
from robust_prune.console import FirstThatFits, Pace, others_silent, track, working


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a terminal of 120 columns receives."""
    shown = io.StringIO()
    monkeypatch.setattr(
        consoles, "console", consoles._Console(file=shown, force_terminal=True, width=120, color_system=None)
    )
    yield shown


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe in which lines come after moments."""
    monkeypatch.setattr(consoles, "SILENCE", 0.3)
    monkeypatch.setattr(consoles, "WORTH_A_LINE", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_pipe_hears_of_work_that_takes_long_even_within_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    with working("Exporting"):
        with track("PGD", 40, done=10) as advance:
            advance(5, "robust 40 %")
            time.sleep(1.9)
        time.sleep(0.6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "PGD: 15/40, 1 s so far, robust 40 %"
    assert "PGD: done in 1.9 s, robust 40 %" in lines
    assert lines[-1].startswith("Exporting: ") and lines[-1].endswith("s so far")


def test_short_work_is_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    with working("Opening"), track("PGD", 2) as advance:
        advance(2)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("impatient")
def test_what_others_print_is_suppressed_and_the_console_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with working("Exporting"), others_silent():
        print("[torch.onnx] Obtain model graph")
        time.sleep(1.6)
    consoles.console.print("after")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Exporting: ") and lines[-1] == "after" and not any("torch.onnx" in x for x in lines)


def test_a_terminal_shows_one_moving_line_of_the_innermost_work(terminal: io.StringIO) -> None:
    with working("Compressing"), track("PGD", 40) as advance:
        advance(10, "robust 40 %")
        time.sleep(0.4)
    shown = terminal.getvalue()
    assert "PGD [######..................] 10/40, 1 s so far, robust 40 %" in shown
    assert consoles._active == []


def test_other_processes_of_a_distributed_run_are_silent(tmp_path: Any) -> None:
    code = (
        "import time; from robust_prune import console as c; c.SILENCE = 0.1\n"
        "with c.working('x'): time.sleep(1.5)\n"
        "c.warn('note'); c.alarm('alarm')"
    )
    rank = {"RANK": "1", "WORLD_SIZE": "2"}
    for extra, silent in (({}, False), (rank, True)):
        ran = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), **extra}, cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (ran.stdout == "") == silent, ran.stdout


# --- estimates -------------------------------------------------------------------------------------------------------


def test_the_time_left_is_known_only_after_a_warm_up_and_is_measured_without_it() -> None:
    pace = Pace(1000)
    assert pace.left(0.0) is None
    pace.advance(1, 60.0)  # compilation
    assert pace.left(60.0) is None
    for unit in range(9):
        pace.advance(1, 61.0 + unit)
        assert pace.left(61.0 + unit) is None
    pace.advance(1, 70.0)
    assert pace.left(70.0) == pytest.approx(989.0)
    assert pace.left(75.0) == pytest.approx(984.0)  # the estimate falls while a unit goes on


def test_units_of_an_earlier_run_do_not_count() -> None:
    pace = Pace(100, done=90)
    pace.advance(0, 0.0)
    pace.advance(1, 10.0)
    assert pace.left(10.0) is None
    for unit in range(1, 6):
        pace.advance(1, 10.0 + unit)
    assert pace.left(15.0) == pytest.approx(4.0)


def test_a_few_fast_units_tell_nothing() -> None:
    pace = Pace(1000)
    for unit in range(100):
        pace.advance(1, 0.01 * unit)
    assert pace.left(1.0) is None


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_widest_table_that_fits_is_taken() -> None:
    tables = []
    for text in ("a" * 60, "b" * 30, "c" * 10):
        table = Table()
        table.add_column(text)
        tables.append(table)
    for width, letter in ((100, "a"), (50, "b"), (20, "c"), (8, "c")):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(FirstThatFits(*tables))
        assert letter in console.file.getvalue()  # type: ignore[attr-defined]


def test_sentences_under_a_table_are_not_padded_to_the_width() -> None:
    console = Console(width=1000, file=io.StringIO(), color_system=None)
    console.print(FirstThatFits(Table("a"), below="one\ntwo"))
    assert console.file.getvalue().splitlines()[-2:] == ["one", "two"]  # type: ignore[attr-defined]


def test_a_pipe_has_no_width_unless_one_is_said(tmp_path: Any) -> None:
    code = "from robust_prune.console import console; console.print('word ' * 100)"
    for columns, lines in ({}, 1), ({"COLUMNS": "60"}, 9):
        environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | columns
        ran = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert len(ran.stdout.splitlines()) == lines
