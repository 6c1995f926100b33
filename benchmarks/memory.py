"""Peak memory and time of the sensitivity of a ResNet-50 at 224 pixels, and of the repair after a cut.

    python benchmarks/memory.py --images 256

Images of CIFAR-10, enlarged to 224 pixels, are attacked by one step, and MRS is measured by the boundary estimator at
one radius; more steps and radii take more time and as much memory. The weights are random: memory and time do not
depend on them. The peak is the largest resident set of the process after each part (`VmHWM` of Linux), with what Python
and torch need before anything is loaded. Nothing is chosen by these figures.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from robust_prune.attacks import ThreatModel
from robust_prune.budget.analysis import Analysis
from robust_prune.budget.cost import cost_model
from robust_prune.budget.plan import make_plan
from robust_prune.data.base import TensorImages, random_images
from robust_prune.data.sources import load_data
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.ranking.importance import channel_scores
from robust_prune.recipe import PruningSection, SensitivitySection
from robust_prune.runs.files import write_json, write_text
from robust_prune.sensitivity.adversarial_set import make_adversarial_set
from robust_prune.sensitivity.estimators import measure
from robust_prune.structure.groups import find_groups
from robust_prune.surgery.apply import apply
from robust_prune.surgery.reconstruction import reconstruct

SIDE, CLASSES = 224, 10
OUT = Path(__file__).parent / "results" / "memory.json"


def peak() -> float:
    """Return the largest resident set of this process so far in GB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tune_allocator()
    torch.manual_seed(0)
    section = SensitivitySection(images=args.images, steps=1)
    threat = ThreatModel("linf", 4 / 255)
    rows: list[dict[str, Any]] = [{"part": "torch and this package", "seconds": 0.0, "peak_gb": peak()}]

    def note(part: str, begin: float) -> None:
        rows.append({"part": part, "seconds": time.monotonic() - begin, "peak_gb": peak()})
        result = {
            "rows": rows, "images": args.images, "threads": torch.get_num_threads(), "environment": snapshot()
        }  # fmt: skip
        write_json(args.out, result)
        write_text(args.out.with_suffix(".md"), report(result))

    begin = time.monotonic()
    model = timm.create_model("resnet50", num_classes=CLASSES).eval()
    small, labels = random_images(load_data("cifar10").train, args.images, 0)
    large = F.interpolate(small.float(), (SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
    note("model and images", begin)
    begin = time.monotonic()
    adv = make_adversarial_set(model, TensorImages(large, labels), threat, section)
    note("adversarial images, 1 step", begin)
    begin = time.monotonic()
    measure(model, adv, section, radii=())
    note("MRS, boundary, 1 radius", begin)
    begin = time.monotonic()
    example = large[:1].float() / 255
    found = find_groups(model, example)
    costs = cost_model(model, example, found.groups)
    analysis = Analysis(found, costs, None, channel_scores(model, found.groups, "magnitude"))
    plan = make_plan(analysis, PruningSection(allocation="uniform", criterion="magnitude"))
    surgery = apply(model, plan, example)
    note("groups, plan and cut, half of the MACs", begin)
    begin = time.monotonic()
    images = torch.cat([large.float() / 255, adv.images])
    fitted = reconstruct(surgery.model, model, surgery.removed, images)
    note(f"least squares, {len(fitted)} layers, {len(images)} images", begin)
    print(report({"rows": rows, "images": args.images, "threads": torch.get_num_threads(), "environment": snapshot()}))


def report(result: dict[str, Any]) -> str:
    """Return the table of a result as Markdown."""
    machine = result["environment"]
    lines = [
        "# Memory of MRS and of the repair\n\n"
        f"`benchmarks/memory.py`: ResNet-50 at {SIDE} pixels, {result['images']} images, "
        f"{result['threads']} thread{'s' if result['threads'] > 1 else ''} of {machine['cpu']}, commit "
        f"{str(machine['commit'])[:7]}.\n",
        "| part | seconds | peak of the process so far, GB |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {row['part']} | {row['seconds']:.0f} | {row['peak_gb']:.2f} |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
