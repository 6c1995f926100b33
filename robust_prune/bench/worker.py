"""One process, one model: answers commands on its standard input with one JSON line each.

Started by `sampler` as ``python -m robust_prune.bench.worker``. It times runs with a monotonic clock inside
the process, so pipes and the parent's scheduling are not part of any figure, and it ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from ..errors import EnvironmentProblem, RobustPruneError
from .session import example, import_onnxruntime, open_session


def runner(session: Any, name: str, images: Any, kind: str, provider: str) -> Callable[[], Any]:
    """What is timed: ``host`` hands arrays in and takes arrays out, ``device`` runs on bound memory."""
    if kind == "host":
        return lambda: session.run(None, {name: images})
    ort = import_onnxruntime()
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(images, provider, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, provider, 0)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def open_file(request: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Opens the requested file at its batch size, runs it once and says what runs."""
    path, provider, batch = Path(request["path"]), request["provider"], request["batch"]
    session, signature = open_session(path, provider, request["threads"], batch)
    shape = signature.batched(batch, path.name)
    run = runner(session, signature.name, example(shape, signature.dtype, request["seed"]), request["kind"], provider)
    run()
    return run, {"provider": session.get_providers()[0], "shape": list(shape), "dtype": signature.dtype}


def timed(run: Callable[[], Any], runs: int, wake: int) -> list[int]:
    """Nanoseconds of each of `runs` runs, after `wake` untimed ones that refill the caches."""
    for _ in range(wake):
        run()
    times = []
    for _ in range(runs):
        begin = perf_counter_ns()
        run()
        times.append(perf_counter_ns() - begin)
    return times


def main() -> None:
    """Serves commands until the input ends."""
    # A library that prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run: Callable[[], Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["op"] == "open":
                run, answer = open_file(request)
            else:
                assert run is not None, "time before open"
                answer = {"ns": timed(run, request["runs"], request["wake"])}
        except RobustPruneError as error:
            answer = {"error": str(error), "environment": isinstance(error, EnvironmentProblem)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "environment": False}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
