"""Tests latency measurements: repeated ratios of a file to itself, to its copy and to a smaller model.

    python benchmarks/noise_floor.py runs/demo/dense.onnx runs/demo/model.onnx

Every repeat is a full measurement by `robust-prune bench` with another seed: the first file, a copy of it and the
second file, interleaved, the first file twice (A/A). With 95 % intervals, the interval of an A/A ratio excludes 1 by
chance in one of twenty repeats. If it happens more often, the intervals are too narrow or the machine is busy.

Results are written after every repeat, and the same command resumes with the missing ones. Run it on a quiet machine;
the load before each repeat is recorded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from robust_prune.bench.hardware import load_average
from robust_prune.bench.latency import run
from robust_prune.console import console
from robust_prune.machine.snapshot import snapshot
from robust_prune.runs.files import file_sha256, write_json, write_text


def repeat(dense: Path, small: Path, copy: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the results of one measurement."""
    load = load_average()
    table = run(
        [("dense", dense), ("copy", copy), ("small", small)],
        batches=(args.batch,), threads=(args.threads,), seconds_budget=args.seconds, seed=seed,
    )  # fmt: skip
    rows = {row.label: row for row in table.rows}
    (floor,) = table.noise_floor.values()
    return {
        "seed": seed,
        "load_before": load,
        "launches": rows["dense"].launches,
        "floor": list(floor),
        "p50_ms": {label: row.p50_ms for label, row in rows.items()},
        **{name: asdict(ratio) for name in ("copy", "small") if (ratio := rows[name].speedup) is not None},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the missing repeats, store each, and return all results."""
    settings = {
        "dense": file_sha256(args.dense),
        "small": file_sha256(args.small),
        "batch": args.batch,
        "threads": args.threads,
        "seconds": args.seconds,
    }
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        stored = json.loads(args.out.read_text(encoding="utf-8"))
        if stored["settings"] != settings:
            raise SystemExit(f"{args.out} holds results of other settings. Choose another --out, or remove it.")
        rows = stored["rows"]
    result: dict[str, Any] = {"settings": settings, "environment": snapshot(), "rows": rows}
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copy(args.dense, Path(folder) / "copy.onnx"))
        for seed in range(len(rows), args.repeats):
            rows.append(repeat(args.dense, args.small, copy, args, seed))
            result["environment"] = snapshot()
            write_json(args.out, result)
            value, low, high = rows[-1]["floor"]
            console.print(f"{seed + 1}/{args.repeats}: A/A {value:.3f} [{low:.3f}, {high:.3f}]", markup=False)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of all repeats."""
    rows, settings = result["rows"], result["settings"]
    outside = sum(not low <= 1 <= high for _, low, high in (row["floor"] for row in rows))
    verdicts = {name: [row[name]["verdict"] for row in rows] for name in ("copy", "small")}
    speedups = [row["small"]["value"] for row in rows]
    starts = sorted({row["launches"] for row in rows})
    lines = [
        "# Latency: how far a repeat can be believed\n",
        f"`benchmarks/noise_floor.py` on {result['environment']['cpu']}: batch {settings['batch']}, "
        f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}, {settings['seconds']:g} s a repeat "
        f"over {' or '.join(map(str, starts))} starts of the processes, "
        f"{len(rows)} repeats.\n",
        f"- The A/A interval leaves 1 in **{outside} of {len(rows)}** repeats.",
        f"- A copy of the file: {_counted(verdicts['copy'])}.",
        f"- The smaller model: {_counted(verdicts['small'])}; speed-up {np.median(speedups):.2f} "
        f"[{min(speedups):.2f}, {max(speedups):.2f}] (median and range over the repeats).\n",
        "| repeat | load before | A/A [95 %] | copy [95 %] | smaller model [95 %] |",
        "| ---: | ---: | --- | --- | --- |",
    ]
    for row in rows:
        ratios = [row["floor"], *([row[n]["value"], row[n]["low"], row[n]["high"]] for n in ("copy", "small"))]
        shown = " | ".join(f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in ratios)
        lines.append(f"| {row['seed'] + 1} | {row['load_before']} | {shown} |")
    return "\n".join(lines) + "\n"


def _counted(verdicts: list[str]) -> str:
    return ", ".join(f"“{v}” {verdicts.count(v)} times" for v in sorted(set(verdicts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="an ONNX classifier")
    parser.add_argument("small", type=Path, help="another, with half of its MACs, say")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "noise_floor.json")
    args = parser.parse_args()
    result = measure(args)
    write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
