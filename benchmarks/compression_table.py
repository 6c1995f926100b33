"""Tables of `compression.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from recovered import RESAMPLES, interval, right_images

REFERENCE = "mrs"
Rows = Sequence[Mapping[str, Any]]


def right(row: Mapping[str, Any], attack: str) -> np.ndarray:
    """Return 1.0 for each test image that a row's model classifies correctly under `pgd` or `aa_fast`, else 0.0."""
    return right_images(row[attack], "robust")


def tables(bases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the Markdown text: the differences to `mrs`, meaned over the bases, and a table for each base."""
    text = [
        "# Compression\n\n`benchmarks/compression.py`, which says how the rows are made. Accuracies are in percent, of "
        "test images; differences in points, paired by seed and image; 95 % intervals over seeds and images. PGD: 20 "
        "steps from one start on the margin, an upper bound, 2,000 images. "
        "Minutes are processor minutes; those in all count the analysis of `mrs` for every arm that prunes, although "
        "rules without MRS need less of it.\n",
        *_joint({name: stored["rows"] for name, stored in bases.items()}),
    ]
    for name, stored in bases.items():
        text += _one(name, stored)
    return "\n".join(text)


def _joint(rows: Mapping[str, Rows]) -> list[str]:
    cells = sorted({(row["ratio"], row["minutes"]) for mine in rows.values() for row in mine})
    arms = dict.fromkeys(row["arm"] for mine in rows.values() for row in mine if row["arm"] != REFERENCE)
    text = [
        f"## Difference of each arm to `{REFERENCE}` under `aa-fast`, mean over the networks\n\nIn brackets the "
        "interval, then the number of networks of which both arms have a row.\n",
        "| | " + " | ".join(f"{100 * ratio:g} %, {minutes:g} min" for ratio, minutes in cells) + " |",
        "| --- |" + " ---: |" * len(cells),
    ]
    for arm in arms:
        found = []
        for cell in cells:
            apart = [d for mine in rows.values() if (d := _difference(_at(mine, cell), arm)) is not None]
            found.append(f"{mean_text(apart)}, {len(apart)}" if apart else "–")
        text.append(f"| {arm} | " + " | ".join(found) + " |")
    return [*text, ""]


def _at(rows: Rows, cell: tuple[float, float]) -> Rows:
    return [row for row in rows if (row["ratio"], row["minutes"]) == cell]


def _difference(rows: Rows, arm: str) -> np.ndarray | None:
    """Return the differences of an arm to the reference [seeds, images] in points, or None without a common seed."""
    mine, reference = ({r["seed"]: right(r, "aa_fast") for r in rows if r["arm"] == name} for name in (arm, REFERENCE))
    shared = sorted(mine.keys() & reference.keys())
    return 100 * np.stack([mine[seed] - reference[seed] for seed in shared]) if shared else None


def mean_text(values: Sequence[np.ndarray]) -> str:
    """Return the mean over networks, each [seeds, images], and its 95 % interval over the seeds and images of each."""
    generator = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for each in values:
        seeds, images = each.shape
        for position in range(RESAMPLES):
            drawn = each[generator.integers(0, seeds, seeds)].mean(0)
            means[position] += drawn[generator.integers(0, images, images)].mean() / len(values)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{np.mean([each.mean() for each in values]):+.1f} [{low:+.1f}, {high:+.1f}]"


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
                spent = f"{minutes:g} | {_spent(mine, stored):.1f}"
                text.append(
                    f"| {arm} | {spent} | {len(mine)} | {_mean(mine, 'macs') / 1e6:.1f} M | "
                    f"{_mean(mine, 'params') / 1e3:.0f} k | " + " | ".join(times.get(arm, ["–"] * 3)) + " | "
                    f"{_share(mine, 'pgd', 'clean')} | {_share(mine, 'pgd')} | {_share(mine, 'aa_fast')} | "
                    f"{mean_text([apart]) if apart is not None else ''} |"
                )
        text.append("")
    machines = sorted({f"{row['environment']['cpu']}, commit {row['environment']['commit'][:7]}" for row in rows})
    flags = sorted({flag for row in rows for flag in row["flags"]})
    return [*text, f"Rows: {'; '.join(machines)}. Alarms: {'; '.join(flags) or 'none'}.\n"]


def latencies(stored: Mapping[str, Any], ratio: float) -> dict[str, list[str]]:
    """Return the median latencies of batch 1 and 32 and of the int8 file by arm, as text with 95 % intervals."""
    rows = stored.get("latency", {}).get(f"{ratio:g}", {}).get("rows", [])
    found = {
        (row["label"], row["batch"]): f"{row['p50_ms']:.3g} [{row['p50_low']:.3g}, {row['p50_high']:.3g}]"
        for row in rows
    }
    wanted = (("", 1), ("", 32), (", int8", 1))
    return {name: [found.get((name + end, batch), "–") for end, batch in wanted] for name, batch in found if batch == 1}


def _spent(rows: Rows, stored: Mapping[str, Any]) -> float:
    """Return the mean minutes of analysis, cut, repair and training; a small network from scratch needs the last."""
    total = 0.0
    for row in rows:
        seconds = stored["analysis_seconds"][str(row["seed"])]
        prepared = row["cut_seconds"] + seconds["cuts" if row["arm"] == "cuts" else "mrs"]
        total += row["train_seconds"] + (prepared if row["arm"] != "from scratch" else 0)
    return total / 60 / len(rows)


def _mean(rows: Rows, name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _share(rows: Rows, attack: str, which: str = "robust") -> str:
    values = 100 * np.stack([right_images(row[attack], which) for row in rows])
    low, high = interval(values)
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"
