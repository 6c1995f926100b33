"""Tables of the comparison of criteria, with intervals over seeds and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from recovered import interval

REFERENCE = "mrs"


def outcomes(rows: list[dict[str, Any]], which: str) -> np.ndarray:
    """Return whether each image is classified correctly, 1.0 or 0.0, [seeds, images], in the order of the seeds."""
    total = rows[0]["after"][which]["total"]
    ordered = sorted(rows, key=lambda row: row.get("seed", 0))
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(r["after"][which + "_bits"]), np.uint8))[:total] for r in ordered]
    return np.array(bits, dtype=float)


def tables(result: dict[str, Any], names: Sequence[str]) -> str:
    """Return Markdown with a summary and a table for each ratio, with the arms in the order of `names`."""
    rows, settings, environment = result["rows"], result["settings"], result["environment"]
    fine = settings["recipe"]["finetune"]
    text = [
        f"# Criteria and allocations: {settings['arch']} on {settings['data']}\n",
        f"`benchmarks/criteria.py`, torch {environment['versions']['torch']} on {environment['cpu']} "
        f"({environment['device']}). Fine-tuning: {fine['loss']}, {fine['epochs']} epochs of "
        f"{settings['train_images']:,} images. Before: PGD-{settings['recipe']['evaluation']['steps']} on "
        f"{rows[0]['before']['robust']['total']} held-out training images. After: {rows[0]['after']['attack']}, on "
        f"{rows[0]['after']['robust']['total']:,} {settings['split']} images; brackets: 95 % bootstrap intervals over "
        f"seeds and images; differences are paired with `{REFERENCE}` by seed and image, and `=` stands where their "
        "interval holds 0: the two are not told apart.\n",
        commits(rows),
    ]
    names = list(dict.fromkeys((*names, *(row["name"] for row in rows))))
    text += _summary(rows, names)
    for ratio in sorted({row["ratio"] for row in rows}):
        text += [
            f"## {ratio:.0%} of the MACs removed\n",
            "| arm | seeds | MACs kept | params kept | before: clean | robust | after: clean | robust [95 %] | "
            f"robust against {REFERENCE} [95 %] |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        by_arm = {name: [r for r in rows if r["ratio"] == ratio and r["name"] == name] for name in names}
        for name, mine in by_arm.items():
            if mine:
                text.append(_line(name, mine, by_arm[REFERENCE]))
        text.append("")
    return "\n".join(text)


def _summary(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Return a table of robust accuracy after fine-tuning: that of the reference, and paired differences to it."""
    ratios = sorted({row["ratio"] for row in rows})
    text = [
        "| robust accuracy, % | " + " | ".join(f"{ratio:.0%} of the MACs gone" for ratio in ratios) + " |",
        "| --- |" + " ---: |" * len(ratios),
    ]
    for name in names:
        cells = []
        for ratio in ratios:
            mine = [row for row in rows if row["ratio"] == ratio and row["name"] == name]
            reference = [row for row in rows if row["ratio"] == ratio and row["name"] == REFERENCE]
            if name == REFERENCE:
                values = outcomes(reference, "robust")
                low, high = interval(values)
                cells.append(f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]")
            else:
                cells.append(_against(mine, reference))
        if any(cells):
            text.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*text, ""]


def _against(mine: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Return the difference to the reference over the same seeds; empty if a seed of the reference is missing."""
    seeds = {row["seed"] for row in mine}
    paired = [row for row in reference if row["seed"] in seeds]
    if not mine or len(paired) != len(mine):
        return ""
    difference = outcomes(mine, "robust") - outcomes(paired, "robust")
    lower, upper = interval(difference)
    same = " =" if lower <= 0 <= upper else ""
    return f"{100 * difference.mean():+.1f} [{100 * lower:+.1f}, {100 * upper:+.1f}]{same}"


def commits(rows: list[dict[str, Any]]) -> str:
    """Return a line with the commit of the rows, or with the arms of each where there are several."""
    found: dict[str, list[str]] = {}
    for row in rows:
        arms = found.setdefault(row.get("commit") or "", [])
        arms += [row["name"]] if row["name"] not in arms else []
    if "" in found:
        return "Some rows were stored without the commit that made them; `../README.md` says what is known of it.\n"
    if len(found) == 1:
        return f"All rows are of commit {next(iter(found))}.\n"
    return "Commits: " + "; ".join(f"{commit}: {', '.join(arms)}" for commit, arms in found.items()) + ".\n"


def _line(name: str, mine: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    def mean(get: Any) -> float:
        return float(np.mean([get(row) for row in mine]))

    def share(accuracy: dict[str, int]) -> float:
        return 100 * accuracy["correct"] / accuracy["total"]

    robust = outcomes(mine, "robust")
    low, high = interval(robust)
    against = "" if name == REFERENCE else _against(mine, reference)
    return (
        f"| {name} | {len(mine)} | {mean(lambda r: 100 * r['macs_kept']):.1f} % | "
        f"{mean(lambda r: 100 * r['params_kept']):.1f} % | {mean(lambda r: share(r['before']['clean'])):.1f} | "
        f"{mean(lambda r: share(r['before']['robust'])):.1f} | {mean(lambda r: share(r['after']['clean'])):.1f} | "
        f"{100 * robust.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}] | {against} |"
    )
