"""Tables of `compression.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from recovered import RESAMPLES, interval, machines, right_images

REFERENCE, UNIFORM, SCRATCH = "mrs", "uniform, adversarial Taylor", "from scratch"
SAME_MACS = 0.005
Rows = Sequence[Mapping[str, Any]]


def right(row: Mapping[str, Any], attack: str) -> np.ndarray:
    """Return 1.0 for each test image that a row's model classifies correctly under `pgd` or `aa_fast`, else 0.0."""
    return right_images(row[attack], "robust")


def network_of(arm: str) -> str:
    """Return the arm whose network an arm has; a small network from scratch is that of the uniform cut."""
    return UNIFORM if arm == SCRATCH else arm


def tables(bases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the Markdown text: the differences to `mrs`, meaned over the bases, and a table for each base."""
    text = [
        "# Compression\n\n`benchmarks/compression.py`, which says how the rows are made. Accuracies are in percent, of "
        "test images; differences in points, paired by seed and image; 95 % intervals over images and, where there are "
        "several, seeds. PGD: 20 steps from one start on the margin, an upper bound, 2,000 images. Minutes are "
        "processor minutes; those in all count the analysis of `mrs` for every arm that prunes, although rules without "
        "MRS need less of it. Latency: ONNX Runtime on a CPU, one thread, median. MACs: in brackets the number that "
        "all widths are multiples of; * more than 0.5 % from the target. From scratch: the network of the uniform "
        "cut.\n",
        *_joint(bases),
    ]
    for name, stored in bases.items():
        if stored["rows"]:
            text += _one(name, stored)
    return "\n".join(text)


def _joint(bases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    every = [row for stored in bases.values() for row in stored["rows"]]
    cells = sorted({(row["ratio"], row["minutes"]) for row in every})
    text = [
        f"## Difference of each arm to `{REFERENCE}` under `aa-fast`, mean over the networks\n\nAfter it the numbers "
        "of networks and of seeds in all of which both arms have a row.\n",
        "| | " + " | ".join(f"{100 * ratio:g} %, {minutes:g} min" for ratio, minutes in cells) + " |",
        "| --- |" + " ---: |" * len(cells),
    ]
    for arm in dict.fromkeys(row["arm"] for row in every if row["arm"] != REFERENCE):
        found = []
        for cell in cells:
            apart = [(s["settings"]["data"], _difference(_at(s["rows"], cell), arm)) for s in bases.values()]
            known = [(data, values) for data, values in apart if values is not None]
            counts = f"{len(known)}, {sum(len(values) for _, values in known)}"
            found.append(f"{mean_text(known)}, {counts}" if known else "–")
        text.append(f"| {arm} | " + " | ".join(found) + " |")
    return [*text, ""]


def _at(rows: Rows, cell: tuple[float, float]) -> Rows:
    return [row for row in rows if (row["ratio"], row["minutes"]) == cell]


def _difference(rows: Rows, arm: str) -> np.ndarray | None:
    """Return the differences of an arm to the reference [seeds, images] in points, or None without a common seed."""
    mine, reference = ({r["seed"]: right(r, "aa_fast") for r in rows if r["arm"] == name} for name in (arm, REFERENCE))
    shared = sorted(mine.keys() & reference.keys())
    return 100 * np.stack([mine[seed] - reference[seed] for seed in shared]) if shared else None


def mean_text(values: Sequence[tuple[str, np.ndarray]]) -> str:
    """Return the mean over networks, and its 95 % interval over the seeds of each and the images.

    Args:
        values: the name of the data set and the outcomes [seeds, images] of each network. Networks on one data set are
            judged on the same images, so these are drawn for all of them at once.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for position in range(RESAMPLES):
        images: dict[tuple[str, int], np.ndarray] = {}
        for data, each in values:
            seeds, count = each.shape
            if (data, count) not in images:
                images[data, count] = np.asarray(generator.integers(0, count, count))
            drawn = each[generator.integers(0, seeds, seeds)].mean(0)
            means[position] += drawn[images[data, count]].mean() / len(values)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{np.mean([each.mean() for _, each in values]):+.1f} [{low:+.1f}, {high:+.1f}]"


def _one(name: str, stored: Mapping[str, Any]) -> list[str]:
    rows: Rows = stored["rows"]
    text = [f"## {name}\n"]
    for ratio in sorted({row["ratio"] for row in rows}):
        text += [
            f"### {100 * ratio:g} % of the MACs removed\n",
            "| arm | minutes of fine-tuning | in all | seeds | MACs | params | b1, ms | b32, ms | b1 int8, ms | "
            f"clean | PGD | aa-fast | aa-fast, difference to {REFERENCE} |",
            "| --- |" + " ---: |" * 12,
        ]
        times = latencies(stored, ratio)
        if "dense" in times:
            text.append("| dense | | | | | | " + " | ".join(times["dense"]) + " | | | | |")
        for minutes in sorted({row["minutes"] for row in rows if row["ratio"] == ratio}):
            at = _at(rows, (ratio, minutes))
            for arm in dict.fromkeys(row["arm"] for row in at):
                mine = [row for row in at if row["arm"] == arm]
                apart = _difference(at, arm) if arm != REFERENCE else None
                spent = f"{minutes:g} | {_spent(mine):.1f}"
                text.append(
                    f"| {arm} | {spent} | {len(mine)} | {_macs(mine)} | {_mean(mine, 'params') / 1e3:.0f} k | "
                    + " | ".join(times.get(network_of(arm), ["–"] * 3))
                    + f" | {_share(mine, 'pgd', 'clean')} | {_share(mine, 'pgd')} | {_share(mine, 'aa_fast')} | "
                    f"{mean_text([('', apart)]) if apart is not None else ''} |"
                )
        text.append("")
    flags = sorted({flag for row in rows for flag in row["flags"]})
    whole = {f"{row['arm']}, seed {row['seed']}" for row in rows if row["rolled_back"]}
    left = f" Groups that failed their proof stayed whole: {'; '.join(sorted(whole))}." if whole else ""
    return [*text, f"Rows: {machines(rows)}. Alarms: {'; '.join(flags) or 'none'}.{left}\n"]


def latencies(stored: Mapping[str, Any], ratio: float) -> dict[str, list[str]]:
    """Return the median latencies of batch 1 and 32 and of the int8 file by arm, as text with 95 % intervals."""
    rows = stored.get("latency", {}).get(f"{ratio:g}", {}).get("rows", [])
    found = {
        (row["label"], row["batch"]): f"{row['p50_ms']:.3g} [{row['p50_low']:.3g}, {row['p50_high']:.3g}]"
        for row in rows
        if row["kind"] == "host"
    }
    wanted = (("", 1), ("", 32), (", int8", 1))
    return {name: [found.get((name + end, batch), "–") for end, batch in wanted] for name, batch in found if batch == 1}


def _spent(rows: Rows) -> float:
    """Return the mean minutes of analysis, cut, repair and training; a small network from scratch needs the last."""
    before = [row["analysis_seconds"] + row["cut_seconds"] if row["arm"] != SCRATCH else 0 for row in rows]
    return float(np.mean([seconds + row["train_seconds"] for seconds, row in zip(before, rows, strict=True)])) / 60


def _macs(rows: Rows) -> str:
    off = any(abs(row["macs_kept"] / (1 - row["ratio"]) - 1) > SAME_MACS for row in rows)
    steps = "/".join(f"{step}" for step in sorted({row["round_to"] for row in rows}))
    return f"{_mean(rows, 'macs') / 1e6:.1f} M ({steps}){'*' if off else ''}"


def _mean(rows: Rows, name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _share(rows: Rows, attack: str, which: str = "robust") -> str:
    values = 100 * np.stack([right_images(row[attack], which) for row in rows])
    low, high = interval(values)
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"
