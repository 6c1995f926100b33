"""The latency of ONNX files side by side, with intervals, a noise floor and the provider proven."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..console import track
from ..errors import UsageError
from . import hardware
from .sampler import LAUNCHES, Arm, Samples, Shape, measure
from .session import PROVIDERS, import_onnxruntime, signature
from .statistics import Interval, excludes_one, judged, median_interval, paired_ratio, percentile
from .types import LatencyRow, LatencyTable

KINDS = ("host", "device")
SECONDS_BUDGET = 20.0
PERCENT = 100


def run(
    files: Sequence[tuple[str, str | Path]],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    provider: str = "cpu",
    kind: str = "host",
    seconds_budget: float = SECONDS_BUDGET,
    seed: int = 0,
) -> LatencyTable:
    """Measures the latency of ONNX classifiers against the first of them.

    Each file runs in its own process; all are visited in random order in every block, the first file twice
    (A/A), so that its ratio to itself is the noise floor below which nothing is called a difference.

    Args:
        files: (label, path) pairs; the first is what the others are compared with.
        batches: batch sizes, each >= 1.
        threads: intra-op thread counts, each >= 1.
        provider: ``cpu`` or ``cuda``; running anywhere else is an error, never a silent fallback.
        kind: ``host`` (arrays in and out) or ``device`` (inputs and outputs bound to the device's memory).
        seconds_budget: timed work over all batches and threads; at least 12 blocks of each are taken.
        seed: of the visiting order and the input images.

    Raises:
        UsageError: a file that is missing, is no image classifier, has a fixed batch or dies while it runs.
        EnvironmentProblem: the provider does not run here.
    """
    paths = [(label, Path(path)) for label, path in files]
    _check(paths, batches, threads, provider, kind)
    before = hardware.describe(provider)
    arms = [Arm(label, path) for label, path in (*paths, (f"{paths[0][0]} (again)", paths[0][1]))]
    shapes = [Shape(batch, count, provider, kind) for batch, count in product(batches, threads)]
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

            samples = measure(arms, shape, seconds_budget / len(shapes), seed, on_block)
            floors[describe(shape)] = floor = paired_ratio(samples[0].seconds, samples[-1].seconds, seed)
            rows += _rows(arms[:-1], shape, samples, floor, seed)
    environment = {**before, "load_1_minute_after": hardware.load_average()}
    return LatencyTable(tuple(rows), floors, environment, _protocol(provider, kind))


def describe(shape: Shape) -> str:
    """The conditions in words, e.g. ``batch 1 x 2 threads``: the key of the noise floor."""
    return f"batch {shape.batch} x {shape.threads} thread{'' if shape.threads == 1 else 's'}"


def _check(
    files: Sequence[tuple[str, Path]], batches: Sequence[int], threads: Sequence[int], provider: str, kind: str
) -> None:
    if not files:
        raise UsageError("no ONNX file to measure was given. Name at least one.")
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}. Choose one of: {', '.join(PROVIDERS)}.")
    if kind not in KINDS:
        raise UsageError(f"unknown kind of row {kind!r}. Choose one of: {', '.join(KINDS)}.")
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
            )
        )
    return rows


def _protocol(provider: str, kind: str) -> str:
    memory = "arrays in and out" if kind == "host" else "inputs and outputs bound to the device's memory"
    search = ", exhaustive cuDNN search" if provider == "cuda" else ""
    return (
        f"{kind} time on {PROVIDERS[provider]} ({memory}{search}), batch fixed, one process a model, no spinning "
        "threads, warmed up until stable, visited in random blocks, the first file twice (A/A), processes started up "
        f"to {LAUNCHES} times; medians and paired ratios with 95 % bootstrap intervals over launches and blocks"
    )


def render_latency(table: LatencyTable) -> Table:
    """The table for a terminal; a tail percentile appears when every row has enough samples for it."""
    tails = [q for q in (90, 95, 99) if all(getattr(row, f"p{q}_ms") is not None for row in table.rows)][-1:]
    counts = {row.threads for row in table.rows}
    view = Table(
        title="Latency (ONNX Runtime)",
        caption=_caption(table, counts),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    view.add_column("model", min_width=6)
    measured = ("p50 ms [95 %]", *(f"p{q} ms" for q in tails), "images/s", "speed-up [95 %]")
    for name in ("batch", *(("threads",) if len(counts) > 1 else ()), *measured):
        view.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        view.add_row(
            escape(row.label + (" *" if row.noisy else "")),
            str(row.batch),
            *((str(row.threads),) if len(counts) > 1 else ()),
            escape(f"{_short(row.p50_ms)} [{_short(row.p50_low)}, {_short(row.p50_high)}]"),
            *(_short(getattr(row, f"p{q}_ms")) for q in tails),
            f"{row.images_per_second:,.0f}",
            escape(speedup_text(row)),
        )
    return view


def _short(milliseconds: float) -> str:
    """Three significant digits, trailing zeros kept so that columns line up."""
    return f"{milliseconds:,.0f}" if milliseconds >= 999.5 else f"{milliseconds:#.3g}".removesuffix(".")


def speedup_text(row: LatencyRow) -> str:
    """The speed-up with its interval, ``none`` inside the noise floor, a dash for the file others stand against."""
    if row.speedup is None:
        return "-"
    ratio = row.speedup
    figure = "none" if ratio.verdict == "no difference" else f"{ratio.value:.2f}x"
    return f"{figure} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _caption(table: LatencyTable, counts: set[int]) -> str:
    floors = (f"{key}: {v:.3f} [{low:.3f}, {high:.3f}]" for key, (v, low, high) in table.noise_floor.items())
    threads = "".join(f", {n} thread{'' if n == 1 else 's'}" for n in counts) if len(counts) == 1 else ""
    where = sorted({f"{row.provider.removesuffix('ExecutionProvider')} {row.kind}" for row in table.rows})
    noisy = any(row.noisy for row in table.rows)
    advice = "\n* noisy: the first file differs from itself. Measure again on a quiet machine." if noisy else ""
    return escape(f"{', '.join(where)} time{threads}. Noise floor (A/A): {'; '.join(floors)}.{advice}")
