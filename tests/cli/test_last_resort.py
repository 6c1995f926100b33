"""Whatever happens, a command ends with one line and a documented exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust_prune import cli, last_resort
from robust_prune.interruption import Terminated


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[Any, str]:
    """Exit code and standard error of a command in which `error` is raised."""

    def app(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as raised:
        cli.main(["doctor"])
    return raised.value.code, capsys.readouterr().err


def no_memory() -> BaseException:
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error
    raise AssertionError


def no_array() -> BaseException:
    try:
        np.zeros(2**50)
    except MemoryError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (no_memory(), 3, "the memory is not enough"),
        (RuntimeError("could not create a primitive"), 3, "the memory is not enough"),
        (RuntimeError("can't start new thread"), 3, "the memory is not enough"),
        (ImportError("x.so: failed to map segment from shared object"), 3, "the memory is not enough"),
        (no_array(), 3, r"the memory is not enough \(Unable to allocate"),
        (PermissionError(13, "Permission denied", "/data/x.png"), 3, r"/data/x\.png: permission denied\."),
        (OSError(36, "File name too long", "x" * 500), 2, "a file name is too long"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (Terminated(), 143, "interrupted; run the same command again"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    found, said = ended(monkeypatch, capsys, error)
    assert found == code and re.match(f"(error: )?{words}", said) and said.count("\n") == 1


def test_a_mistake_of_ours_is_one_line_and_a_file_with_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, said = ended(monkeypatch, capsys, ZeroDivisionError("division\nby \x1b[2Jzero"))
    assert code == 70 == last_resort.EXIT_CODE
    assert said.startswith(
        r"error in robust-prune itself: ZeroDivisionError: division by \x1b[2Jzero. The traceback is"
    )
    assert said.count("\n") == 1 and "report it" in said
    (file,) = tmp_path.iterdir()
    assert str(file) in said
    text = file.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text and "['doctor']" in text and "in app" in text
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "doctor"])


def test_a_name_that_is_not_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["evaluate", os.fsdecode(b"caf\xe9.pt")])
    assert raised.value.code == 2
    assert capsys.readouterr().err == (
        "error: the argument caf\\udce9.pt is not UTF-8 text. Rename the file, or make a link to it.\n"
    )


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_both_signals_say_how_to_go_on(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-u", "-m", "robust_prune", "compress", "demo", "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)],  # see nohup
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("[1/"):
                break
        time.sleep(0.5)
        process.send_signal(sent)
        assert process.stderr.read() == "interrupted; run the same command again to go on from here\n"
        process.stdout.read()
    assert process.returncode == code
    assert not list((tmp_path / "run").rglob("*.part"))
