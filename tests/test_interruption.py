"""No interruption is lost, wherever it comes."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from robust_prune.interruption import Terminated, interruptible


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
