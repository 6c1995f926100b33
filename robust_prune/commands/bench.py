"""robust-prune bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..console import console
from ..errors import UsageError
from .common import check_out_file
from .flags import MEASUREMENT, RUN


def bench(
    *files: Annotated[
        Path, Parameter(group=MEASUREMENT, help="ONNX classifiers; ratios are to the first one.", show_default=False)
    ],
    batch: Annotated[str, Parameter(group=MEASUREMENT, help="Batch sizes in images, separated by commas.")] = "1",
    threads: Annotated[str, Parameter(group=MEASUREMENT, help="Numbers of threads, separated by commas.")] = "1",
    provider: Annotated[
        str,
        Parameter(
            group=MEASUREMENT,
            help="Execution provider: cpu, cuda or tensorrt. A fallback to another one is an error.",
        ),
    ] = "cpu",
    kind: Annotated[
        str,
        Parameter(
            group=MEASUREMENT,
            help="Kinds of runs, separated by commas: host, device (inputs bound to GPU memory), graph (CUDA graph), "
            "defaults (ONNX Runtime's own threads).",
        ),
    ] = "host,defaults",
    energy: Annotated[
        bool,
        Parameter(
            group=MEASUREMENT, negative="", help="Also report the GPU's energy (NVML), in J.", show_default=False
        ),
    ] = False,
    seconds: Annotated[
        float,
        Parameter(
            group=MEASUREMENT, help="Measuring time in total, in seconds.", show_default=lambda value: f"{value:g}"
        ),
    ] = 20.0,
    out: Annotated[Path | None, Parameter(group=RUN, help="JSON file that also receives the table.")] = None,
    seed: Annotated[int, Parameter(group=RUN, help="Seed of the order in which files are visited.")] = 0,
) -> None:
    """Measure the latency of ONNX files side by side, interleaved; ratios are to the first file."""
    if not files:
        raise UsageError("no file given. Try: robust-prune bench dense.onnx model.onnx")
    check_out_file("--out", out)

    from ..bench.latency import render_latency, run
    from ..runs.files import write_json
    from ..serialization import to_json

    table = run(
        [(label, path) for label, path in zip(_labels(files), files, strict=True)],
        batches=_numbers("--batch", batch),
        threads=_numbers("--threads", threads),
        provider=provider,
        kinds=tuple(part.strip() for part in kind.split(",")),
        energy=energy,
        seconds_budget=seconds,
        seed=seed,
    )
    console.print(render_latency(table))
    if out is not None:
        write_json(out, to_json(table))


def _labels(files: tuple[Path, ...]) -> list[str]:
    names = [path.name for path in files]
    if len(set(names)) == len(names):
        return names
    texts = [str(path) for path in files]
    return [text if texts.count(text) == 1 else f"{text} #{index}" for index, text in enumerate(texts, start=1)]


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} wants whole numbers separated by commas, got {text!r}") from error
    if min(values) < 1:
        raise UsageError(f"{flag} wants numbers from 1, got {text!r}")
    return values
