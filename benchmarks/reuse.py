"""How long a second ratio, a dry run and a whole frontier of the demo take.

    python benchmarks/reuse.py --repeats 3

What depends on the model and the data alone (sensitivity, the dense model's evaluation and timings) is measured once
and shared by later commands. Each repeat begins with an empty cache and runs, one after the other on an otherwise idle
machine: `compress demo --ratio 0.5`; the same command with 0.75; the same with `--dry-run`; and, with an empty cache
again, `frontier demo` with its four ratios. Every time is the wall clock of a process, from its start to its end, with
the imports. The share of the second ratio is the median over the repeats. Commands and number of repeats were fixed
before the first run; repeats are stored one by one, and the same command goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from robust_prune.console import console
from robust_prune.machine.snapshot import snapshot
from robust_prune.runs.files import write_json, write_text

OUT = Path(__file__).parent / "results" / "reuse.json"


def seconds(folder: Path, cache: str, *command: str) -> float:
    """Return the wall clock time in seconds of a command of robust-prune that starts in a folder."""
    begin = time.monotonic()
    call = [sys.executable, "-m", "robust_prune", *command, "--cache", cache]
    with (folder / "log").open("ab") as log:
        subprocess.run(call, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True)
    return time.monotonic() - begin


def repeat() -> dict[str, float]:
    """Return the times in seconds of the four commands of one repeat."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        compress = ("compress", "demo", "--ratio")
        return {
            "first": seconds(folder, "cache", *compress, "0.5", "--out", "half"),
            "second": seconds(folder, "cache", *compress, "0.75", "--out", "quarter"),
            "dry_run": seconds(folder, "cache", *compress, "0.75", "--dry-run"),
            "frontier": seconds(folder, "cache2", "frontier", "demo", "--ratio", "0.3,0.5,0.75,0.9", "--out", "all"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    while len(rows) < args.repeats:
        rows.append(repeat() | {"environment": snapshot()})
        write_json(args.out, {"rows": rows})
        write_text(args.out.with_suffix(".md"), report(rows))
    console.print(report(rows), markup=False)


def report(rows: list[dict[str, Any]]) -> str:
    """Return the table of all repeats as Markdown."""
    machines = {(row["environment"]["cpu"], str(row["environment"]["commit"])[:7]) for row in rows}
    share = statistics.median(row["second"] / row["first"] for row in rows)
    lines = [
        f"# Work that is not done twice\n\n`benchmarks/reuse.py`: the demo, {rows[0]['environment']['cores']} cores, "
        f"seconds of each command. A second ratio takes {100 * share:.0f} % of the first one's time (median of "
        f"{len(rows)}). " + "; ".join(f"{cpu}, commit {commit}" for cpu, commit in sorted(machines)) + ".\n",
        "| repeat | `compress --ratio 0.5`, empty cache | `--ratio 0.75`, then | `--dry-run`, then "
        "| `frontier`, four ratios, empty cache |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {index} | {row['first']:.0f} | {row['second']:.0f} | {row['dry_run']:.1f} | {row['frontier']:.0f} |"
        for index, row in enumerate(rows, 1)
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
