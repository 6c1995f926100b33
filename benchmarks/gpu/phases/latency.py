"""Latency by the protocol of `robust-prune bench`: dense, a half and a quarter of the MACs, in fp32 and fp16."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from sizes import Set, Sizes
from skeletons import fill
from work import Work

from robust_prune.bench import latency
from robust_prune.bench.providers import provider_problem
from robust_prune.errors import RobustPruneError
from robust_prune.machine.snapshot import snapshot
from robust_prune.serialization import to_json


def run(work: Work, sizes: Sizes, deadline: float) -> None:
    """Measure the sets that are missing from earlier jobs, in order, until the deadline."""
    found = work.result("latency") or {"tables": [], "failed": []}
    found["environment"] = snapshot()
    found["providers"] = {name: provider_problem(name) or "runs" for name in sizes.providers}
    have = {_key(table["provider"], table["set"]) for table in found["tables"]}
    runs = [name for name, state in found["providers"].items() if state == "runs"]
    failed = {_key(failure["provider"], failure["set"]) for failure in found["failed"]}
    todo = [(name, chosen) for name in runs for chosen in sizes.sets if _key(name, asdict(chosen)) not in have]
    # Sets that failed before are tried again after the others.
    todo.sort(key=lambda entry: _key(entry[0], asdict(entry[1])) in failed)
    found["failed"], took = [], [0.0]
    for provider, chosen in todo:
        begin = time.monotonic()
        if begin + median(took) > deadline:
            work.save("latency", found)
            return
        files = _files(work, chosen)
        try:
            table = latency.run(
                files, batches=(chosen.batch,), threads=(1,), provider=provider, kinds=(chosen.kind,),
                seconds_budget=sizes.latency_seconds,
            )  # fmt: skip
        except RobustPruneError as error:
            found["failed"].append({"provider": provider, "set": asdict(chosen), "reason": str(error)})
        else:
            found["tables"].append({"provider": provider, "set": asdict(chosen), **_without_paths(to_json(table))})
        took = [*filter(None, took), time.monotonic() - begin]
        work.save("latency", found)
    work.save("latency", found, "done")


def _key(provider: str, chosen: dict[str, Any]) -> tuple[Any, ...]:
    return provider, *chosen.values()


def _files(work: Work, chosen: Set) -> list[tuple[str, Path]]:
    """Return (label, file) of every filled skeleton of the architecture; the dense fp32 file is first."""
    folder, filled = work.root / "skeletons" / chosen.arch.replace("/", "-"), work.root / "onnx"
    files = []
    for skeleton in sorted(folder.glob("*.onnx"), key=lambda path: (len(path.stem), path.stem)):
        path = filled / folder.name / skeleton.name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(skeleton, path)
        files.append((skeleton.stem, path))
    return sorted(files, key=lambda file: (file[0] != "dense", file[0]))


def _without_paths(table: dict[str, Any]) -> dict[str, Any]:
    return {**table, "rows": [{key: value for key, value in row.items() if key != "path"} for row in table["rows"]]}
