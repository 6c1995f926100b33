"""Child processes that answer requests, one after the other, and never outlive their parent.

A request and its answer are each a line of JSON, followed by the number of raw bytes that its key ``bytes`` says.
This module imports only what every worker may load.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import robust_prune

from ..errors import EnvironmentProblem, RobustPruneError, UsageError
from ..printable import one_line

Frame = tuple[dict[str, Any], bytes]


class Child:
    """The parent's end of a child process.

    Args:
        what: what the process does, for messages, e.g. ``"the process that timed pruned"``.
        module: name of its module, which calls `serve`.
        arguments: its command line.
    """

    def __init__(self, what: str, module: str, *arguments: str) -> None:
        self.what = what
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _end
        home = str(Path(robust_prune.__file__).parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            # -P: a file called numpy.py in the user's folder must not be imported.
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin
        self._answers: queue.Queue[Frame | None] = queue.Queue()
        # A thread, because pipes cannot be waited on with a timeout on Windows.
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers.put), daemon=True).start()
        self._end = weakref.finalize(self, _end, self._process, self._log)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, request: dict[str, Any], payload: bytes = b"", *, seconds: float) -> Frame:
        """Send one request and return its answer.

        Args:
            request: JSON values.
            payload: bytes that follow it.
            seconds: seconds after which the process is ended.

        Raises:
            UsageError: the child raised it.
            EnvironmentProblem: the child raised it, ended, or did not answer in time.
        """
        try:
            _write(self._input, request, payload)
            found = self._answers.get(timeout=seconds)
        except OSError:
            found = None
        except queue.Empty:
            self.close()
            raise EnvironmentProblem(
                f"{self.what} gave no answer in {seconds:.0f} s. Try a smaller batch or a quieter machine, or look "
                "where the file comes from."
            ) from None
        if found is None:
            raise EnvironmentProblem(self._obituary())
        answer = found[0]
        if "error" in answer:
            raise (EnvironmentProblem if answer["environment"] else UsageError)(answer["error"])
        return found

    def close(self) -> None:
        """End the process."""
        self._end()

    def _obituary(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        hint = " (out of memory? Try a smaller batch)" if code == -9 else ""
        return f"{self.what} {how}{hint}. {lines[-1] if lines else ''}".rstrip()


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()  # `serve` ends its process when its input ends
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    log.close()


def serve(answer: Callable[[dict[str, Any], bytes], Frame]) -> None:
    """Answer requests on the standard input, until it ends, by calling `answer`; what it raises is reported.

    The process ends at once when its parent does, also during a request.
    """
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.Queue[Frame | None] = queue.Queue()

    def watch() -> None:
        try:
            _pump(sys.stdin.buffer, requests.put)
        finally:  # also without memory for a request: the parent would wait, and this process outlive it
            os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    while (found := requests.get()) is not None:
        payload = b""
        try:
            said, payload = answer(*found)
        except RobustPruneError as error:
            said = {"error": str(error), "environment": isinstance(error, EnvironmentProblem)}
        except MemoryError as error:
            said = {"error": f"the memory is not enough ({error}). Use smaller batches.", "environment": True}
        except Exception as error:  # libraries raise errors of many kinds
            said = {"error": one_line(error), "environment": False}
        _write(answers, said, payload)


def _write(stream: IO[bytes], value: dict[str, Any], payload: bytes) -> None:
    stream.write(json.dumps({**value, "bytes": len(payload)}).encode() + b"\n" + payload)
    stream.flush()


def _pump(stream: IO[bytes], put: Callable[[Frame | None], None]) -> None:
    with stream, contextlib.suppress(OSError, ValueError):
        for line in stream:
            value = json.loads(line)
            put((value, stream.read(value.pop("bytes"))))
    put(None)
