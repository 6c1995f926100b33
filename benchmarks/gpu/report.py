"""Writes `benchmarks/results/gpu/README.md` from the results of GPU jobs.

python benchmarks/gpu/report.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import numpy as np  # noqa: E402
from criteria_table import outcomes  # noqa: E402
from recovered import interval  # noqa: E402
from training import speed_table  # noqa: E402
from work import COMMITTED, Work  # noqa: E402

from robust_prune.runs.files import write_text  # noqa: E402


def main() -> None:
    """Write the report of all results, in the order of the phases."""
    work = Work(COMMITTED / "nothing")
    parts = {"facts": facts, "latency": latency, "speed": speed, "base": base, "compression": compression}
    texts = []
    for phase, write in parts.items():
        if found := work.result(phase):
            try:
                text = write(found)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                text = f"## {phase.capitalize()}\n\n{phase}.json is not as the phase writes it ({error!r}): left out.\n"
            texts.append(
                text if found.get("status") == "done" else f"{text}\nNot finished: the phase goes on another time.\n"
            )
    if not texts:
        raise SystemExit(f"{COMMITTED} holds no results. Put the JSON files there that came back.")
    write_text(COMMITTED / "README.md", "\n".join(["# On a GPU\n\n`benchmarks/gpu/`\n", *texts]))
    print(COMMITTED / "README.md")


def facts(found: dict[str, Any]) -> str:
    """Return the section on the GPU and its measured rates."""
    card, versions = found.get("card", {"name": found["environment"]["device"]}), found["environment"]["versions"]
    return (
        f"## Machine\n\n{card['name']}, torch {versions['torch']}, onnxruntime-gpu "
        f"{versions.get('onnxruntime-gpu', '-')}; copies {found['copy_gb_per_second']:,.0f} GB/s (read and written), "
        f"multiplies bf16 matrices at {found['bf16_tflops']:,.3g} TFLOP/s. Providers: "
        f"{', '.join(f'{name}: {state}' for name, state in found['providers'].items())}. Tests that need a GPU: "
        f"{found.get('gpu_tests', 'not run')}\n"
    )


def latency(found: dict[str, Any]) -> str:
    """Return the latency table, with a row for each file of each set."""
    text = [
        "## Latency\n\nMedians of ONNX Runtime, and how many times faster than the dense fp32 file of the same set, "
        "with 95 % intervals; A/A is the dense file's ratio to itself. ONNX Runtime allows TF32 in fp32.\n",
        "| model | provider | batch | kind | A/A | file | ms | faster |",
        "| --- | --- | ---: | --- | --- | --- | ---: | ---: |",
    ]
    for table in sorted(
        found["tables"], key=lambda t: (t["set"]["arch"], t["provider"], t["set"]["batch"], t["set"]["kind"])
    ):
        ((floor, low, high),) = table["noise_floor"].values()
        for row in table["rows"]:
            ratio = row["speedup"]
            faster = "" if ratio is None else f"{ratio['value']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            faster = faster if ratio is None or ratio["verdict"] != "no difference" else f"no difference ({faster})"
            text.append(
                f"| {table['set']['arch']} | {table['provider']} | {row['batch']} | {row['kind']} | "
                f"{floor:.3f} [{low:.3f}, {high:.3f}] | {row['label']} | {row['p50_ms']:.3f} | {faster} |"
            )
    if not found["tables"]:
        text = ["## Latency\n\nNo set was measured."]
    for failure in found["failed"]:
        where = " ".join(map(str, failure["set"].values()))
        text.append(f"\nFailed: {failure['provider']}, {where}: {failure['reason']}")
    return "\n".join(text) + "\n"


def speed(found: dict[str, Any]) -> str:
    """Return the speed table of `training.py`."""
    return speed_table(found)


def base(found: dict[str, Any]) -> str:
    """Return the section on the training and the held-out accuracies of the base model."""
    history, done = found.get("history", []), found.get("status") == "done"
    best = next((record for record in history if record["epoch"] == found.get("best_epoch")), None)
    reached = (
        f"best epoch {best['epoch']}: {100 * best['val_clean']:.1f} % clean, {100 * best['val_robust']:.1f} % under "
        "PGD-10 on held-out images"
        if best
        else "not at its end"
    )
    seconds = sum(record["seconds"] for record in history)
    return (
        f"## Base\n\n{found['arch']}, {found['settings']['loss']} with {found['settings']['steps']} steps, "
        f"{len(history) if done else 'not yet all'} of {found['plan']['epochs']} epochs of "
        f"{found['train_images']:,} images"
        f"{f' in {seconds:.0f} s' if done else ''}"
        f"{', continued from an earlier base' if found['continued'] else ''}; {reached}. {found.get('note', '')}\n"
    )


def compression(found: dict[str, Any]) -> str:
    """Return the table of the accuracies of all arms, paired with `mrs`."""
    rows = found.get("rows", [])
    if not rows:
        return f"## Compression\n\nNot run: {found.get('reason', 'no row is done')}.\n"
    first = rows[0]["after"]
    text = [
        f"## Compression\n\n{found['arch']}; {first['attack']} on {first['robust']['total']:,} test images; one seed; "
        "brackets: 95 % bootstrap intervals over images.\n",
        "| MACs removed | arm | MACs kept | clean | robust | against mrs |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda r: r.get("ratio") or 0):
        clean, robust = outcomes([row], "clean"), outcomes([row], "robust")
        low, high = interval(robust)
        mrs = [r for r in rows if r.get("ratio") == row.get("ratio") and r["name"] == "mrs"]
        text.append(
            f"| {100 * row.get('ratio', 0):.0f} % | {row['name']} | {100 * row.get('macs_kept', 1):.1f} % | "
            f"{100 * clean.mean():.1f} | {100 * robust.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}] | "
            f"{_against(robust, mrs) if row['name'] != 'mrs' else ''} |"
        )
    for table in found.get("latency", []):
        if not table["rows"]:
            text.append(f"\nLatency, {table['provider']}: {table['reason']}")
            continue
        times = ", ".join(f"{r['label']} b{r['batch']} {r['p50_ms']:.3f} ms" for r in table["rows"])
        text.append(f"\nLatency, {table['rows'][0]['provider']}: {times}.")
    return "\n".join(text) + "\n"


def _against(robust: np.ndarray, mrs: list[dict[str, Any]]) -> str:
    if not mrs:
        return ""
    difference = robust - outcomes(mrs, "robust")
    low, high = interval(difference)
    return f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    main()
