"""One process, one model: answers commands on its standard input with one JSON line each.

Started by `sampler` as ``python -m robust_prune.bench.worker PROVIDER``. It times runs with a monotonic clock inside
the process, so pipes and the parent's scheduling are not part of any figure, and it ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from ..errors import EnvironmentProblem, RobustPruneError
from .providers import DEVICES, import_onnxruntime, provider_problem
from .session import example, open_session

# Kernels may add up in another order when they are captured.
GRAPH_TOLERANCE = 1e-3
STALE_SHARE = 0.25


def runner(session: Any, name: str, images: Any, kind: str, device: str) -> Callable[[], Any]:
    """What is timed: ``host`` hands arrays in and takes arrays out, any other kind runs on bound memory of `device`."""
    if kind == "host":
        return lambda: session.run(None, {name: images})
    return bound(session, name, images, device)[0]


def bound(session: Any, name: str, images: Any, device: str, shapes: Any = None) -> tuple[Callable[[], Any], Any, Any]:
    """A run on memory that stays where it is, and its input and outputs there; `shapes`, if known, of the outputs."""
    ort = import_onnxruntime()
    taken = ort.OrtValue.ortvalue_from_shape_and_type(images.shape, images.dtype, device, 0)
    taken.update_inplace(images)  # and not from_numpy, which on a CPU shares the array's memory
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, taken)
    like = shapes or [(array.shape, array.dtype) for array in session.run(None, {name: images})]
    made = [ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0) for shape, dtype in like]
    for output, value in zip(session.get_outputs(), made, strict=True):
        binding.bind_ortvalue_output(output.name, value)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run, taken, made


def replayed(plain: Any, session: Any, name: str, images: Any, other: Any, device: str) -> Callable[[], Any]:
    """A run that replays a CUDA graph, once it has given the logits of two inputs as `plain`, a session without, does.

    Raises:
        EnvironmentProblem: they are not.
    """
    wanted = [plain.run(None, {name: batch}) for batch in (images, other)]
    run, taken, made = bound(session, name, images, device, [(array.shape, array.dtype) for array in wanted[0]])
    run()
    for batch, arrays in ((other, wanted[1]), (images, wanted[0])):
        taken.update_inplace(batch)
        run()
        for value, array, first, second in zip(made, arrays, *wanted, strict=True):
            # The two sessions may have chosen other kernels; a replay of old inputs errs by the whole difference.
            slack = max(GRAPH_TOLERANCE * np.abs(array).max(), STALE_SHARE * np.abs(first - second).max())
            if not np.allclose(value.numpy(), array, rtol=GRAPH_TOLERANCE, atol=slack):
                raise EnvironmentProblem(
                    "the captured CUDA graph gives other logits than the session without it. Use kind device."
                )
    return run


def open_file(request: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Opens the requested file at its batch size, runs it once and says what runs."""
    path, provider, batch, kind = Path(request["path"]), request["provider"], request["batch"], request["kind"]
    session, signature = open_session(path, provider, request["threads"], batch)
    shape, device = signature.batched(batch, path.name), DEVICES[provider]
    images = example(shape, signature.dtype, request["seed"])
    if kind == "graph":
        plain = session
        session, _ = open_session(path, provider, request["threads"], batch, graph=True)
        other = example(shape, signature.dtype, request["seed"] + 1)
        run = replayed(plain, session, signature.name, images, other, device)
        del plain  # its memory is not the graph's
    else:
        run = runner(session, signature.name, images, kind, device)
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
    # Libraries are loaded while other workers load theirs; what is wrong with them is said when a file is opened.
    with contextlib.suppress(RobustPruneError):
        provider_problem(*sys.argv[1:2] or ["cpu"])
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
