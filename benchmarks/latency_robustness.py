"""The suite: latency and robust accuracy together, over models, ratios, precisions and providers, in one table.

    python benchmarks/latency_robustness.py demo --data cifar10 --ratios 0.5 0.75 --precisions int8

Every model is compressed at every ratio by the product's own command, `robust-prune compress`, in a process of its own;
its run folder holds everything, and a run that was killed goes on where it was. The runs are then put into one report:
a table with a line a file, and a Pareto plot of latency against the robust accuracy of that very file.

How it measures. Within a run the dense file, its copy for the noise floor, and all files of the pruned model are timed
interleaved, each in a process of its own; a speed-up is always against the dense file of the same run. Each provider
is a run of its own: files that were cut to one budget are the same, latencies are not. Accuracies are of the files
themselves, on the adversarial images of their torch model, over the same test images for every row.

A machine that does something else meanwhile spoils latencies: rows whose noise floor leaves 1 are marked in the runs'
own reports. Delete the folder `bench` of a run and start the same command again to repeat that alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from robust_prune.console import console
from robust_prune.machine.snapshot import snapshot
from robust_prune.report.compare import compare, load_run
from robust_prune.report.files import to_csv, to_markdown
from robust_prune.report.html import render
from robust_prune.runs.files import write_json, write_text
from robust_prune.serialization import to_json

NAME = "latency_robustness"


def runs(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of every run, by its name."""
    common = ["--data", args.data, "--tier", args.tier]
    common += [] if args.recipe is None else ["--recipe", args.recipe]
    common += [] if args.images is None else ["--images", str(args.images)]
    common += [] if not args.precisions else ["--precision", ",".join(args.precisions)]
    batches, threads = (",".join(map(str, values)) for values in (args.batches, args.threads))
    common += ["--set", f"bench.batches=[{batches}]", "--set", f"bench.threads=[{threads}]"]
    common += [part for assignment in args.set for part in ("--set", assignment)]
    found = {}
    for model in args.models:
        for provider in args.providers:
            for ratio in args.ratios:
                parts = [Path(model).stem] if len(args.models) > 1 else []
                parts += [provider] if len(args.providers) > 1 else []
                name = " ".join([*parts, f"{100 * ratio:g} %"])
                found[name] = [
                    "compress", model, "--ratio", str(ratio), *common, "--set", f"bench.provider={provider}",
                    "--out", str(args.runs / name.replace(" %", "").replace(" ", "-")),
                ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="robust models: artifacts, or demo")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--recipe", help="threat model, fine-tuning and evaluation")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--precisions", nargs="*", default=["fp16", "int8"], choices=["fp16", "int8"])
    parser.add_argument("--providers", nargs="+", default=["cpu"], choices=["cpu", "cuda", "tensorrt"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--tier", default="pgd")
    parser.add_argument("--images", type=int, help="test images; all by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe value")
    parser.add_argument("--runs", type=Path, default=Path("runs") / NAME)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    done = {}
    for name, command in runs(args).items():
        console.print(f"robust-prune {' '.join(command)}", markup=False)
        subprocess.run([sys.executable, "-m", "robust_prune.cli", *command], check=True)
        done[name] = load_run(command[command.index("--out") + 1])
    line = f"python benchmarks/{NAME}.py {' '.join(sys.argv[1:])}"
    joint = compare(done, line)
    write_json(args.out / f"{NAME}.json", {"environment": snapshot(), "report": to_json(joint)})
    write_text(args.out / f"{NAME}.md", to_markdown(joint))
    write_text(args.out / f"{NAME}.csv", to_csv(joint))
    write_text(args.out / f"{NAME}.html", render(joint))
    print(to_markdown(joint))


if __name__ == "__main__":
    main()
