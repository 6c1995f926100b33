"""Latency of ONNX files side by side, with confidence intervals, a noise floor and a verified provider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..bench import hardware
from ..console import FOLDED, FirstThatFits, track
from ..errors import UsageError
from ..machine import nvml
from ..machine.runtime import import_onnxruntime
from ..recipe import BenchSection
from .providers import PROVIDERS, require
from .sampler import LAUNCHES, Arm, Samples, Shape, measure
from .session import signature
from .statistics import Interval, excludes_one, judged, median_interval, paired_ratio, percentile
from .types import LatencyRow, LatencyTable

KINDS = {
    "host": "arrays in and out",
    "device": "inputs and outputs bound to the device's memory",
    "graph": "the same, replayed as a CUDA graph that was checked on two inputs",
    "defaults": "arrays in and out, with ONNX Runtime's own number of threads, which spin",
}
DEFAULTS = "defaults"
SECONDS_BUDGET = 20.0
PERCENT = 100


def run(
    files: Sequence[tuple[str, str | Path]],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    provider: str = "cpu",
    kinds: Sequence[str] = ("host",),
    seconds_budget: float = SECONDS_BUDGET,
    seed: int = 0,
    energy: bool = False,
) -> LatencyTable:
    """Measure the latency of ONNX classifiers relative to the first of them.

    Each file runs in its own process. In every block the files are timed in random order, the first one twice (A/A).
    The ratio of the first file to itself is the noise floor; smaller ratios are reported as no difference.

    Args:
        files: (label, path) pairs; the first file is the baseline.
        batches: batch sizes, each >= 1.
        threads: numbers of intra-op threads, each >= 1.
        provider: execution provider: ``cpu``, ``cuda`` or ``tensorrt``; a fallback to another one is an error.
        kinds: kinds of rows: ``host`` (arrays in and out), ``device`` (inputs and outputs bound to device memory) or
            ``graph`` (the same, replayed as a CUDA graph that is checked on two inputs; GPU providers only), or
            ``defaults`` (arrays in and out, with the threads that ONNX Runtime takes by itself; `threads` is not used).
        seconds_budget: seconds of timed runs over all batches, threads and kinds; at least 12 blocks of each are taken.
        seed: random seed of the order and of the input images.
        energy: whether to read GPU energy from NVML's counter, during three seconds of runs of each model.

    Raises:
        UsageError: a file is missing, is not an image classifier, has a fixed batch size or fails while it runs, or an
            argument is out of range.
        EnvironmentProblem: the provider does not run on this machine.
    """
    paths = [(label, Path(path)) for label, path in files]
    _check(paths, batches, threads, provider, kinds, energy)
    before = hardware.describe(provider)
    arms = [Arm(label, path) for label, path in (*paths, (f"{paths[0][0]} (again)", paths[0][1]))]
    shapes = [
        Shape(batch, count, provider, kind)
        for kind, batch in product(kinds, batches)
        for count in ((0,) if kind == DEFAULTS else threads)
    ]
    rows: list[LatencyRow] = []
    floors: dict[str, Interval] = {}
    with track("Latency", total=PERCENT * len(shapes)) as advance:
        for shape in shapes:
            advance(0, note=f"{describe(shape)}: warming up")
            shown = 0

            def on_block(done: int, total: int, shape: Shape = shape) -> None:
                nonlocal shown
                advance(PERCENT * done // total - shown, note=describe(shape))
                shown = PERCENT * done // total

            samples = measure(arms, shape, seconds_budget / len(shapes), seed, on_block, energy)
            floors[describe(shape)] = floor = paired_ratio(samples[0].seconds, samples[-1].seconds, seed)
            rows += _rows(arms[:-1], shape, samples, floor, seed)
    environment = {**before, "after": hardware.state(provider)}
    load = hardware.load_per_core(environment)
    rows = [replace(row, load_per_core=load) for row in rows]
    return LatencyTable(tuple(rows), floors, environment, _protocol(provider, kinds))


def run_section(files: Sequence[tuple[str, str | Path]], section: BenchSection, seed: int) -> LatencyTable:
    """Call `run` with the batch sizes, threads, provider, kinds and time of a recipe's bench section."""
    return run(
        files, batches=section.batches, threads=section.threads, provider=section.provider, kinds=section.kinds,
        seconds_budget=section.seconds * len(section.batches) * len(section.threads) * len(section.kinds), seed=seed,
    )  # fmt: skip


def describe(shape: Shape) -> str:
    """Return the conditions in words, e.g. ``batch 1 x 2 threads``, which is the key of the noise floor."""
    if shape.kind == DEFAULTS:
        return f"batch {shape.batch}, ONNX Runtime's defaults"
    kind = "" if shape.kind == "host" else f" ({shape.kind})"
    return f"batch {shape.batch} x {shape.threads} thread{'' if shape.threads == 1 else 's'}{kind}"


def _check(
    files: Sequence[tuple[str, Path]],
    batches: Sequence[int],
    threads: Sequence[int],
    provider: str,
    kinds: Sequence[str],
    energy: bool,
) -> None:
    if not files:
        raise UsageError("no ONNX file to measure was given. Name at least one.")
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}. Choose one of: {', '.join(PROVIDERS)}.")
    check_kinds(provider, kinds)
    if energy and (provider == "cpu" or nvml.joules() is None):
        raise UsageError(
            "energy is read from the counters of NVIDIA GPUs, on a GPU provider with nvidia-ml-py installed: "
            f"{'the provider is cpu' if provider == 'cpu' else 'no counter was found'}. Leave it out."
        )
    for name, values in (("batch", batches), ("threads", threads)):
        if not values or min(values) < 1:
            raise UsageError(f"{name} must be whole numbers >= 1, got {', '.join(map(str, values)) or 'none'}. Try 1.")
    labels = [label for label, _ in files]
    if len(set(labels)) < len(labels):
        raise UsageError(f"each file needs its own label, got {', '.join(labels)}")
    ort = import_onnxruntime()
    for label, path in files:
        if not path.is_file():
            raise UsageError(f"{path} does not exist or is no file")
        takes = signature(ort, path)
        for batch in batches:
            takes.batched(batch, f"{label} ({path.name})")


def check_section(section: BenchSection) -> None:
    """Check, before a run begins, that latency can be measured as the recipe asks.

    Raises:
        EnvironmentProblem: the provider does not run on this machine.
        UsageError: the provider does not support these kinds of rows.
    """
    require(section.provider)
    check_kinds(section.provider, section.kinds)


def check_kinds(provider: str, kinds: Sequence[str]) -> None:
    """Raise UsageError if a kind of row is unknown or the provider does not support it."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"unknown kind of row {', '.join(unknown)!r}. Choose one of: {', '.join(KINDS)}.")
    if provider == "cpu" and "graph" in kinds:
        raise UsageError("rows of kind graph replay CUDA graphs, which the cpu provider does not have. Use kind host.")


def _rows(
    arms: Sequence[Arm], shape: Shape, samples: Sequence[Samples], floor: Interval, seed: int
) -> list[LatencyRow]:
    rows = []
    for index, (arm, taken) in enumerate(zip(arms, samples, strict=False)):
        p50, low, high = median_interval(1000 * taken.seconds, seed)
        speedup = judged(paired_ratio(samples[0].seconds, taken.seconds, seed), floor) if index else None
        tails = {q: percentile(1000 * taken.seconds, q) for q in (90, 95, 99)}
        rows.append(
            LatencyRow(
                label=arm.label,
                path=str(arm.path),
                provider=taken.provider,
                kind=shape.kind,
                batch=shape.batch,
                threads=shape.threads,
                samples=taken.seconds.size,
                p50_ms=p50,
                p50_low=low,
                p50_high=high,
                p90_ms=tails[90],
                p95_ms=tails[95],
                p99_ms=tails[99],
                images_per_second=1000 * shape.batch / p50,
                speedup=speedup,
                noisy=excludes_one(floor),
                launches=len(taken.seconds),
                memory_mib=taken.memory_mib,
                gpu_memory_mib=taken.gpu_memory_mib,
                millijoules_per_image=None if taken.joules is None else 1000 * taken.joules / shape.batch,
            )
        )
    return rows


def _protocol(provider: str, kinds: Sequence[str]) -> str:
    memory = "; ".join(f"{kind}: {KINDS[kind]}" for kind in kinds)
    spinning = "" if tuple(kinds) == (DEFAULTS,) else "no spinning threads, "
    search = "; exhaustive cuDNN search, TF32 allowed" if provider == "cuda" else ""
    return (
        f"Time on {PROVIDERS[provider]} ({memory}{search}), batch fixed, one process a model, {spinning}warmed up "
        "until stable, visited in random blocks, the first file twice (A/A), processes started up "
        f"to {LAUNCHES} times; medians and paired ratios with 95 % bootstrap intervals over launches and blocks"
    )


def render_latency(table: LatencyTable) -> FirstThatFits:
    """Return the table for a terminal; it has the highest tail percentile for which every row has enough samples.

    Where it does not fit, names are folded, and then images per second and the tail are left out.
    """
    speed, tail = ("images/s",), ("p90 ms", "p95 ms", "p99 ms")
    return FirstThatFits(
        _latency_table(table, (), None),
        *(_latency_table(table, left_out, FOLDED) for left_out in ((), speed, (*speed, *tail))),
        below=_caption(table),
    )


def _latency_table(table: LatencyTable, left_out: Sequence[str], widest_name: int | None) -> Table:
    view = Table(
        title="Latency (ONNX Runtime)",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    view.add_column("model", min_width=6, max_width=widest_name, overflow="fold")
    columns = [(name, cell) for name, shown, cell in _columns(table) if shown and name not in left_out]
    for name, _ in columns:
        view.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        view.add_row(escape(row.label + ("*" if row.doubts else "")), *(escape(cell(row)) for _, cell in columns))
    return view


def _columns(table: LatencyTable) -> list[tuple[str, bool, Callable[[LatencyRow], str]]]:
    """Return the heading of each column but the first, whether it is shown, and a function from row to cell."""
    tail = next((q for q in (99, 95, 90) if all(getattr(row, f"p{q}_ms") is not None for row in table.rows)), 0)
    energy = any(row.millijoules_per_image is not None for row in table.rows)
    return [
        ("batch", True, lambda row: str(row.batch)),
        ("threads", len({row.threads for row in table.rows}) > 1, lambda row: str(row.threads or "own")),
        ("kind", len({row.kind for row in table.rows}) > 1, lambda row: row.kind),
        ("p50 ms [95 %]", True, lambda row: f"{_short(row.p50_ms)} [{_short(row.p50_low)}, {_short(row.p50_high)}]"),
        (f"p{tail} ms", bool(tail), lambda row: _short(getattr(row, f"p{tail}_ms"))),
        ("images/s", True, lambda row: f"{row.images_per_second:,.0f}"),
        (
            "mJ/image",
            energy,
            lambda row: "-" if row.millijoules_per_image is None else _short(row.millijoules_per_image),
        ),
        ("speed-up [95 %]", True, speedup_text),
    ]


def _short(milliseconds: float) -> str:
    """Format milliseconds with three significant digits; trailing zeros are kept so that columns align."""
    return f"{milliseconds:,.0f}" if milliseconds >= 999.5 else f"{milliseconds:#.3g}".removesuffix(".")


def speedup_text(row: LatencyRow) -> str:
    """Return the speed-up with its interval, ``none`` within the noise floor, or a dash for the baseline."""
    if row.speedup is None:
        return "-"
    ratio = row.speedup
    figure = "none" if ratio.verdict == "no difference" else f"{ratio.value:.2f}x"
    return f"{figure} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _caption(table: LatencyTable) -> str:
    counts = {row.threads for row in table.rows}
    floors = (f"{key}: {v:.3f} [{low:.3f}, {high:.3f}]" for key, (v, low, high) in table.noise_floor.items())
    counts.discard(0)
    threads = "".join(f", {n} thread{'' if n == 1 else 's'}" for n in counts) if len(counts) == 1 else ""
    where = sorted({f"{row.provider.removesuffix('ExecutionProvider')} {row.kind}" for row in table.rows})
    doubts = dict.fromkeys(doubt for row in table.rows for doubt in row.doubts)
    advice = f"\n* in doubt: {'; '.join(doubts)}. Measure again on a quiet machine." if doubts else ""
    return f"{', '.join(where)} time{threads}. Noise floor (A/A): {'; '.join(floors)}.{_memory(table)}{advice}"


def _memory(table: LatencyTable) -> str:
    """Return a line with the largest memory use of each model."""
    lines = []
    for name, words in (("memory_mib", "Memory of its process"), ("gpu_memory_mib", "on the GPU")):
        largest: dict[str, float] = {}
        for row in table.rows:
            used = getattr(row, name)
            if used is not None:
                largest[row.label] = max(used, largest.get(row.label, 0.0))
        if largest:
            lines.append(f"{words}: {', '.join(f'{label} {used:,.0f} MiB' for label, used in largest.items())}")
    return f"\n{'; '.join(lines)}." if lines else ""
