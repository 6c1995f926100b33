"""No interruption is lost, wherever it comes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from robust_prune.__main__ import main as start
from robust_prune.interruption import Terminated, interruptible


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Background jobs of a shell ignore SIGINT, and those of nohup SIGHUP."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Finalised:
    """Is interrupted where Python has no one to give the exception to."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interruption_within_a_finaliser_comes_again(
    number: int, raised: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        value = Finalised(number)
        del value
        for _ in range(300):
            time.sleep(0.01)

    with pytest.raises(raised) as caught, interruptible():
        work()
    assert type(caught.value) is raised
    assert capsys.readouterr().err == ""


def test_other_lost_errors_are_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("in a finaliser")

    reported: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(str(lost.exc_value)))
    with interruptible():
        Broken()
    Broken()
    assert reported == ["in a finaliser"] * 2


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_what_is_lost_at_the_end_is_raised_there(number: int, raised: type[BaseException]) -> None:
    with pytest.raises(raised), interruptible():
        Finalised(number)
    time.sleep(0.1)


def test_a_closed_terminal_ends_a_command_that_ignores_sigterm() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(Terminated), interruptible():
            Finalised(signal.SIGHUP)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "robust_prune.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "robust_prune.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on from here\n"
