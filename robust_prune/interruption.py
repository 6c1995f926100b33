"""Ctrl-C, SIGTERM and a closed terminal all end a command in the same way, whenever they come."""

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SOON = 0.05  # seconds until an interruption that was lost is sent again


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, or its terminal was closed; it ends as after Ctrl-C."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work inside as Ctrl-C does, and let no interruption be lost.

    An interruption that comes while Python runs code whose errors have no one to go to (a finaliser, a callback from
    C or Rust) is printed as ignored and forgotten, and the work goes on for hours; here it is sent once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Windows has no SIGHUP, which tells that the terminal was closed.
    numbers = [signal.SIGTERM, *filter(None, [getattr(signal, "SIGHUP", None)])]
    # A signal that is ignored, as by nohup, stays so.
    handlers = {number: signal.signal(number, _end) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    report = sys.unraisablehook
    waiting: list[tuple[threading.Timer, type[BaseException]]] = []

    def send_again(lost: "sys.UnraisableHookArgs") -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            report(lost)
            return
        number = next(iter(handlers)) if isinstance(lost.exc_value, Terminated) else signal.SIGINT
        # By a thread: sent from here it would be raised here, where it would be lost again.
        again = threading.Timer(SOON, _thread.interrupt_main, (number,))
        again.daemon = True
        again.start()
        waiting.append((again, type(lost.exc_value)))

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in handlers.items():
            signal.signal(number, handler)
        unsent = [kind for timer, kind in waiting if not timer.finished.is_set()]
        for timer, _ in waiting:
            timer.cancel()
    if unsent:
        raise unsent[0]


def _end(*_: object) -> None:
    raise Terminated
