"""What becomes of damaged files and disturbed runs: refused in one line, or as if nothing had happened.

    python benchmarks/faults.py --only recipes=10000 artifacts=10000 results=2000 onnx=5000
    python benchmarks/faults.py --only killed=200 starved=60 damaged=60 shared=20 changed=60

Files are changed at random, by a fixed seed: recipes in their lines, values and bytes; model files in their bytes, in
their manifest and in their tensors, with and without new hashes; result files in their values; ONNX files in their
bytes. Each is opened as the commands do. Counted are those that are refused with one line, those that open, those that
open with other weights than were written and say nothing, tracebacks, and files that take more than ten seconds or two
gigabytes above what the process had. What is done to runs of `train` and `compress` stands in `hostile_runs.py`.
Results are written after every fifty files and every run, and the same command goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import resource
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_runs
import numpy as np
import safetensors.torch
import torch
from rich.console import Console

import robust_prune as rp
from robust_prune import recipe_reader
from robust_prune.data.sources import load_data
from robust_prune.errors import RobustPruneError
from robust_prune.evaluation.onnx_scores import OnnxModel
from robust_prune.exporters.onnx import export_model
from robust_prune.machine.snapshot import snapshot
from robust_prune.models import artifact, integrity, registry
from robust_prune.recipe import ExportSection, Recipe
from robust_prune.report.compare import load_run
from robust_prune.report.files import to_csv, to_markdown
from robust_prune.report.html import render
from robust_prune.report.table import headline_table
from robust_prune.runs.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
SLOW_SECONDS, LARGE_BYTES = 10.0, 2 << 30
ODD_TEXTS = (
    "nan", ".inf", "-1", "0", "1e99999999", "null", "~", "[]", "{}", "[[[]]]", '"a\\0b"', '"\\uD800"', "2001-99-99",
    "!!python/object/apply:os.system ['x']", "0x_", "1:1:1:1:1", "9" * 30, "9" * 5000, "on", "!!binary aGk=",
    "&a [*a]", "*nope", "<<", "? x", "x" * 5000, "8/0", "/", "\x1b[2J", "é", "|", "%", "`", "'", "[",
    "!!int x", "1.5", "file.py:f",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, 0, -1, 1, 1e308, math.nan, math.inf, 10**40, "", "=cmd()", "\x1b[2J", "\ud800", "a" * 100_000, [], {}, [[]],
    True, 1e-320, "<script>", "../x", 10**9,
)  # fmt: skip


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with a few of them changed, or cut off."""
    found = bytearray(data)
    if rng.random() < 0.1:
        return bytes(found[: rng.randrange(len(found))])
    for _ in range(rng.choice((1, 1, 2, 5, 50))):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def changed(rng: random.Random, value: Any, odd: tuple[Any, ...] = ODD_VALUES) -> Any:
    """Return a copy of a JSON value in which a few parts are replaced or gone."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        waiting = [value]
        while waiting:
            item = waiting.pop()
            keys = item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
            places += [(item, key) for key in keys]
            waiting += [item[key] for key in keys]
        if not places:
            break
        holder, key = rng.choice(places)
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(odd)
    return value


class Recipes:
    """Recipes, changed in lines, values and bytes."""

    slow_seconds = SLOW_SECONDS

    def __init__(self, work: Path) -> None:
        self.file = work / "changed.yaml"
        self.texts = [path.read_text(encoding="utf-8") for path in recipe_reader.shipped().values()]
        self.texts.append(Recipe().to_yaml())

    def make(self, rng: random.Random) -> None:
        lines = rng.choice(self.texts).split("\n")
        for _ in range(rng.choice((1, 1, 2, 3))):
            at, how = rng.randrange(len(lines)), rng.randrange(5)
            if how < 2 and ":" in lines[at]:
                lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(ODD_TEXTS)}"
            elif how == 2:
                lines.insert(at, rng.choice(ODD_TEXTS))
            elif how == 3:
                lines[at] = rng.choice((" ", "\t", "- ")) + lines[at]
            elif len(lines) > 1:
                del lines[at]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        self.file.write_bytes(flipped(rng, data) if data and rng.random() < 0.2 else data)

    def open(self) -> bool:
        recipe_reader.check_code(recipe_reader.load(str(self.file)), ())
        return True


class Artifacts:
    """Model files, changed in bytes, manifest and tensors."""

    slow_seconds = SLOW_SECONDS

    def __init__(self, work: Path) -> None:
        torch.manual_seed(0)
        self.file = work / "changed.safetensors"
        spec = registry.make_spec(
            "cifar/resnet20_x0.25", num_classes=4, input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.2,) * 3
        )
        self.model = registry.build(spec).eval()
        artifact.save(self.file, self.model, spec)
        self.whole = self.file.read_bytes()
        (length,) = struct.unpack("<Q", self.whole[:8])
        self.manifest = json.loads(json.loads(self.whole[8 : 8 + length])["__metadata__"][artifact.KEY])

    def make(self, rng: random.Random) -> None:
        how = rng.randrange(4)
        if how == 0:
            self.file.write_bytes(flipped(rng, self.whole))
            return
        tensors, manifest = safetensors.torch.load(self.whole), self.manifest
        if how == 1:  # tensors with the old hashes
            name = rng.choice(sorted(tensors))
            tensors[name] = rng.choice(
                (tensors[name].float() * 1.001 + 1e-3, tensors[name].flatten()[:0], torch.zeros(1))
            )
        else:  # the manifest, with the old hashes or with new ones
            manifest = changed(rng, manifest)
            if how == 3 and isinstance(manifest, dict):
                manifest.pop(integrity.MANIFEST, None)
                manifest = integrity.sealed(manifest, tensors)
        safetensors.torch.save_file(tensors, self.file, metadata={artifact.KEY: json.dumps(manifest)})

    def open(self) -> bool:
        found, wanted = artifact.load(self.file).module.state_dict(), self.model.state_dict()
        return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Results:
    """Result files, changed in their values."""

    slow_seconds = SLOW_SECONDS

    def __init__(self, work: Path) -> None:
        self.file = work / "result.json"
        self.values = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.rglob("result.json"))]

    def make(self, rng: random.Random) -> None:
        self.file.write_text(json.dumps(changed(rng, rng.choice(self.values))), encoding="utf-8")

    def open(self) -> bool:
        report = load_run(self.file)
        table = to_csv(report)
        to_markdown(report)
        render(report)
        Console(file=io.StringIO(), width=80).print(headline_table(report))
        return not any(cell.startswith(("=", "@")) for line in table.splitlines() for cell in line.split(","))


class OnnxFiles:
    """ONNX files, changed in their bytes, and run on two images."""

    slow_seconds = SLOW_SECONDS

    def __init__(self, work: Path) -> None:
        self.file, whole = work / "changed.onnx", work / "whole.onnx"
        model, data = rp.load("demo"), load_data("sample")
        export_model(model.module, model.spec, data.train, whole, ExportSection(), 0)
        self.whole = whole.read_bytes()
        self.images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 32, 32), np.float32))

    def make(self, rng: random.Random) -> None:
        self.file.write_bytes(flipped(rng, self.whole))

    def open(self) -> bool:
        model = OnnxModel(self.file)
        try:
            model.predict(self.images)
        finally:
            model.close()
        return True


FILES: dict[str, Callable[[Path], Any]] = {
    "recipes": Recipes, "artifacts": Artifacts, "results": Results, "onnx": OnnxFiles,
}  # fmt: skip
RUNS: dict[str, Callable[[Path], Any]] = {
    "killed": hostile_runs.Killed, "starved": hostile_runs.Starved, "damaged": hostile_runs.Damaged,
    "shared": hostile_runs.Shared, "changed": hostile_runs.Changed,
}  # fmt: skip
KINDS = FILES | RUNS


def peak_kilobytes() -> int:
    """Return the largest resident memory of this process since it was last reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def tried(kind: Any, rng: random.Random) -> str:
    """Return what became of one changed file or disturbed run."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before, children = peak_kilobytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    begin = time.monotonic()
    try:
        kind.make(rng)
        begin = time.monotonic()
        outcome = "opened" if kind.open() else "opened with other contents"
    except RobustPruneError as error:
        outcome = "refused" if "\n" not in str(error) else "refused in several lines"
    except Exception as error:  # what is counted
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"traceback: {type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
        if isinstance(error, hostile_runs.Failure):
            outcome = str(error)
    if time.monotonic() - begin > kind.slow_seconds:
        outcome = f"longer than {kind.slow_seconds:g} s"
    # Kilobytes on Linux. Of the processes that have ended, the largest counts.
    largest = max(peak_kilobytes() - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - children)
    if 1024 * largest > LARGE_BYTES:
        outcome = "more than 2 GB"
    return outcome


def counts_table(head: str, kinds: dict[str, dict[str, int]]) -> list[str]:
    """Return the lines of a Markdown table of outcomes."""
    lines = [head, "| --- | ---: | ---: | ---: | --- |"]
    for name, counts in kinds.items():
        rest = {key: count for key, count in counts.items() if key not in ("refused", "opened")}
        others = "; ".join(f"{count} {' '.join(key.split())}" for key, count in rest.items()) or "none"
        total = sum(counts.values())
        lines.append(f"| {name} | {total:,} | {counts.get('refused', 0):,} | {counts.get('opened', 0):,} | {others} |")
    return lines


def table(result: dict[str, Any]) -> str:
    """Return the Markdown tables."""
    every = [environment for kind in result["environments"].values() for environment in kind]
    machines = sorted({f"{e['cpu']}, commit {e['commit'][:7]}" for e in every})
    made = f"`benchmarks/faults.py`, seed {result['seed']}, {'; '.join(machines)}."
    lines = [f"# Damaged files and disturbed runs\n\n{made}\n"]
    if files := {name: counts for name, counts in result["kinds"].items() if name in FILES}:
        lines += counts_table(
            "| files | changed at random | refused in one line | opened, as written | anything else |", files
        )
        lines.append(
            "\n*Anything else* would be a traceback, a message of several lines, more than ten seconds or two "
            "gigabytes, a model with other weights than were written, or a table with a cell that a spreadsheet runs. "
            "A recipe or an ONNX file that opens may say something else than before: a changed number is a number.\n"
        )
    if runs := {name: counts for name, counts in result["kinds"].items() if name in RUNS}:
        lines += counts_table(
            "| runs of `train` and `compress` | disturbed at random | refused in one line "
            "| finished, equal to an undisturbed run | anything else |",
            runs,
        )
        lines.append(
            "\nBy turns under `precision: auto` and fp32. *Equal*: weights, ONNX files, correct images, file names.\n"
        )
        for name in runs:
            where = ", ".join(f"{text} {count}" for text, count in sorted(result["where"][name].items()))
            lines.append(f"- **{name}** ({hostile_runs.__dict__[name.capitalize()].what}): {where}.")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["recipes=10000", "artifacts=10000", "results=2000", "onnx=5000"],
                        metavar="KIND=COUNT", help=f"kinds: {', '.join(KINDS)}")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    args = parser.parse_args()
    empty: dict[str, Any] = {"kinds": {}, "where": {}, "environments": {}}
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else empty
    result["seed"] = args.seed
    for text in args.only:
        name, _, count = text.partition("=")
        counts = Counter(result["kinds"].get(name, {}))
        if counts.total() >= int(count):
            continue
        with tempfile.TemporaryDirectory() as folder:
            kind = KINDS[name](Path(folder))
            kind.turn, rng = counts.total(), random.Random(args.seed + counts.total())
            environment, before = snapshot(), result["environments"].get(name, [])
            before = [known for known in before if known["commit"] != environment["commit"]]
            earlier: Counter[str] = Counter(result["where"].get(name, {}))
            while counts.total() < int(count):
                counts[tried(kind, rng)] += 1
                if name in RUNS or counts.total() % 50 == 0 or counts.total() == int(count):
                    result["kinds"][name] = dict(counts.most_common())
                    result["where"][name] = dict(earlier + Counter(getattr(kind, "where", {})))
                    result["environments"][name] = [*before, environment]
                    write_json(args.out, result)
                    write_text(args.out.with_suffix(".md"), table(result))
        print(name, result["kinds"][name], flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
