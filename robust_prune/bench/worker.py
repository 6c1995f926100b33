"""Worker process that times one model and answers each command on standard input with one JSON line.

`sampler` starts it as ``python -m robust_prune.bench.worker PROVIDER``. Runs are timed inside the process with a
monotonic clock, so that times include neither pipes nor the parent process. The process ends when its input ends.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from ..errors import EnvironmentProblem, RobustPruneError
from ..machine.child import Frame, serve
from ..machine.runtime import import_onnxruntime, limit_memory
from .providers import DEVICES, provider_problem
from .session import example, open_session

# Captured kernels may sum in another order.
GRAPH_TOLERANCE = 1e-3
STALE_SHARE = 0.25


def runner(session: Any, name: str, images: Any, kind: str, device: str) -> Callable[[], Any]:
    """Return the function to time: on arrays for the kinds ``host`` and ``defaults``, else on memory of `device`."""
    if kind in ("host", "defaults"):
        return lambda: session.run(None, {name: images})
    return bound(session, name, images, device)[0]


def bound(session: Any, name: str, images: Any, device: str, shapes: Any = None) -> tuple[Callable[[], Any], Any, Any]:
    """Return a function that runs on bound memory of `device`, with its input and its outputs there.

    Args:
        session: the ONNX Runtime session.
        name: name of the input.
        images: input array.
        device: ``cpu`` or ``cuda``.
        shapes: shape and data type of each output; by default they are found by a run.
    """
    ort = import_onnxruntime()
    taken = ort.OrtValue.ortvalue_from_shape_and_type(images.shape, images.dtype, device, 0)
    taken.update_inplace(images)  # unlike from_numpy, which on a CPU shares the memory of the array
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
    """Return a function that replays a CUDA graph, after checking its logits for two inputs.

    Args:
        plain: session without a CUDA graph, whose logits are the reference.
        session: session with a CUDA graph.
        name: name of the input.
        images, other: two inputs.
        device: device of the bound memory.

    Raises:
        EnvironmentProblem: the logits of the two sessions differ.
    """
    wanted = [plain.run(None, {name: batch}) for batch in (images, other)]
    run, taken, made = bound(session, name, images, device, [(array.shape, array.dtype) for array in wanted[0]])
    run()
    for batch, arrays in ((other, wanted[1]), (images, wanted[0])):
        taken.update_inplace(batch)
        run()
        for value, array, first, second in zip(made, arrays, *wanted, strict=True):
            # The sessions may use different kernels; a graph that ignores new inputs is off by their full difference.
            slack = max(GRAPH_TOLERANCE * np.abs(array).max(), STALE_SHARE * np.abs(first - second).max())
            if not np.allclose(value.numpy(), array, rtol=GRAPH_TOLERANCE, atol=slack):
                raise EnvironmentProblem(
                    "the captured CUDA graph gives other logits than the session without it. Use kind device."
                )
    return run


def open_file(request: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Open the requested file, run it once, and return the function to time and the answer to the command."""
    path, provider, batch, kind = Path(request["path"]), request["provider"], request["batch"], request["kind"]
    if provider == "cpu" and path.is_file():  # CUDA reserves more addresses than there is memory
        limit_memory(path)
    session, signature = open_session(path, provider, request["threads"], batch)
    shape, device = signature.batched(batch, path.name), DEVICES[provider]
    images = example(shape, signature.dtype, request["seed"])
    if provider == "cpu":
        limit_memory(path, images.nbytes)
    if kind == "graph":
        plain = session
        session, _ = open_session(path, provider, request["threads"], batch, graph=True)
        other = example(shape, signature.dtype, request["seed"] + 1)
        run = replayed(plain, session, signature.name, images, other, device)
        del plain  # frees its memory before the measurement
    else:
        run = runner(session, signature.name, images, kind, device)
    run()
    return run, {"provider": session.get_providers()[0], "shape": list(shape), "dtype": signature.dtype}


def timed(run: Callable[[], Any], runs: int, wake: int) -> list[int]:
    """Return the nanoseconds of each of `runs` runs, after `wake` untimed runs that refill the caches."""
    for _ in range(wake):
        run()
    times = []
    for _ in range(runs):
        begin = perf_counter_ns()
        run()
        times.append(perf_counter_ns() - begin)
    return times


def main() -> None:
    """Answer commands until standard input ends."""
    # Libraries are loaded here, in parallel with other workers; errors are reported when a file is opened.
    with contextlib.suppress(RobustPruneError):
        provider_problem(*sys.argv[1:2] or ["cpu"])
    run: Callable[[], Any] | None = None

    def answer(request: dict[str, Any], _: bytes) -> Frame:
        nonlocal run
        if request["op"] == "open":
            run, opened = open_file(request)
            return opened, b""
        assert run is not None, "time before open"
        return {"ns": timed(run, request["runs"], request["wake"])}, b""

    serve(answer)


if __name__ == "__main__":
    main()
