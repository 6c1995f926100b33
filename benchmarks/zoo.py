"""Which architectures go through: every model of a list cut to half its MACs, proven, reloaded and exported.

    python benchmarks/zoo.py

Each model is measured in a process of its own with a time limit, ours and torch-pruning's own pruner (see
`plain_pruning.py`) one after the other. Weights are random but not fresh: batch-norms, norms, layer scales and linear
layers are drawn so that nothing is zero or one and no softmax is uniform, or every check would pass by itself. Inputs
are real images at the size in the list. Widths are uniform shares by magnitude, since nothing here is about accuracy.

Results are written after every model; the same command goes on with what is missing. `--report` only draws the table,
`--docs` puts the short one into the documentation, and `--only` measures some models again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from robust_prune.budget.analysis import Analysis
from robust_prune.console import console
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe import PruningSection
from robust_prune.runs.files import write_json, write_text

RATIO = 0.5
ARMS = ("ours", "plain")
IMAGES = 9
EQUAL = 1e-3
BEGIN, MARK, END = "<!-- support -->", "<!-- from zoo.md -->", "<!-- /support -->"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
CLASSES = 1000

_TIMM = {
    64: "resnest14d",
    128: "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 seresnet50 res2net50_26w_4s densenet121 vgg16_bn "
    "mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 tf_efficientnetv2_b0 regnety_004 "
    "repvgg_a0 mobileone_s0 ghostnet_100 ghostnetv2_100 dla34 hrnet_w18_small cspresnet50 hgnetv2_b0 dpn68 "
    "eca_resnet33ts convnext_tiny convnextv2_atto convformer_s18 poolformer_s12 mobilevit_xxs mobilevit_xs "
    "mobilevit_s mobilevitv2_050 edgenext_xx_small fastvit_t8 repvit_m0_9 efficientvit_b0",
    224: "efficientvit_m0 efficientformer_l1 efficientformerv2_s0 levit_128s vit_tiny_patch16_224 "
    "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 swin_tiny_patch4_window7_224 pvt_v2_b0 pit_ti_224 "
    "coat_lite_tiny cait_xxs24_224 xcit_nano_12_p16_224 tiny_vit_5m_224 mixer_s16_224",
    256: "maxvit_rmlp_pico_rw_256",
}
_TORCHVISION = {
    128: "resnet18 mobilenet_v3_small shufflenet_v2_x1_0 squeezenet1_1 googlenet mnasnet1_0 swin_t convnext_tiny",
    224: "vit_b_16",
    299: "inception_v3",
}
_CIFAR = (
    "mobilevit_xs preact_resnet18 resnet18 resnet20 resnet32 resnet34 vgg16_bn wideresnet_16_4 wideresnet_28_10 "
    "wideresnet_34_10 wideresnet_70_16"
)


def models() -> dict[str, int]:
    """Input size by architecture."""
    found = {f"timm/{name}": size for size, names in _TIMM.items() for name in names.split()}
    found |= {f"torchvision/{name}": size for size, names in _TORCHVISION.items() for name in names.split()}
    return found | {f"cifar/{name}": 32 for name in _CIFAR.split()}


def measure(arch: str, size: int, arm: str) -> dict[str, Any]:
    """One row's half, in this process."""
    import torch
    import torch.nn.functional as F

    from robust_prune.data.sample import load_sample
    from robust_prune.models import registry
    from robust_prune.structure.reference import make_reference

    torch.manual_seed(0)
    torch.set_num_threads(1)
    classes = 10 if arch.startswith("cifar/") else CLASSES
    spec = registry.make_spec(arch, num_classes=classes, input_size=(3, size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
    x, _ = load_sample().train.get(torch.arange(IMAGES))
    images = F.interpolate(x.float() / 255, (size, size), mode="bilinear", antialias=False)
    model, dtype = make_reference(registry.build(spec).eval(), images[:1])
    if arm == "plain":
        return _plain(model, classes, images, dtype)
    return _ours(model.float(), spec, images)


def _ours(model: Any, spec: Any, images: Any) -> dict[str, Any]:
    import torch

    from robust_prune.budget.cost import cost_model
    from robust_prune.budget.counting import count_macs, count_params
    from robust_prune.budget.plan import make_plan
    from robust_prune.models import artifact
    from robust_prune.ranking.importance import channel_scores
    from robust_prune.structure.groups import find_groups
    from robust_prune.surgery.apply import apply

    example = images[:1]
    begin = time.monotonic()
    search = find_groups(model, example)
    cost = cost_model(model, example, search.groups)
    plan = make_plan(
        Analysis(search, cost, None, channel_scores(model, search.groups, "magnitude")),
        PruningSection(ratio=RATIO, allocation="uniform", criterion="magnitude"),
    )
    surgery = apply(model, plan, example)
    seconds = time.monotonic() - begin
    small = surgery.model.eval()
    row: dict[str, Any] = {
        "groups": [len(surgery.applied), len(search.groups) + len(search.skipped)],
        "macs_kept": count_macs(small, example) / count_macs(model, example),
        "params_kept": count_params(small) / count_params(model),
        "parity": surgery.parity,
        "seconds": seconds,
        "note": plan.note,
        "refused": {r.name: r.reason for r in (*search.skipped, *surgery.rolled_back)},
        "edits": list(surgery.edits),
        "backward": _trains(small, images),
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        artifact.save(path, small, spec)
        again = artifact.load(path).module
        with torch.no_grad():
            row["reload"] = bool(torch.equal(again(images), small(images)))
        row |= _export(small, images, Path(folder))
    return row


def _plain(model: Any, classes: int, images: Any, dtype: Any) -> dict[str, Any]:
    from plain_pruning import prune_plain

    from robust_prune.budget.counting import count_macs, count_params

    before = count_macs(model, images[:1].to(dtype)), count_params(model)
    begin = time.monotonic()
    small, row = prune_plain(model, classes, images.to(dtype))
    row["seconds"] = time.monotonic() - begin
    if small is not None:
        row["macs_kept"] = count_macs(small, images[:1].to(dtype)) / before[0]
        row["params_kept"] = count_params(small) / before[1]
        with TemporaryDirectory() as folder:
            row |= _export(small.float().eval(), images, Path(folder))
    return row


def _trains(model: Any, images: Any) -> bool:
    """Whether a training step's backward pass reaches every parameter with finite gradients."""
    import torch

    from robust_prune.structure.reference import copy_model

    trained = copy_model(model).train()
    trained(images).square().mean().backward()
    return all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in trained.parameters())


def _export(model: Any, images: Any, folder: Path) -> dict[str, Any]:
    from robust_prune.errors import RobustPruneError
    from robust_prune.exporters.onnx import export_onnx

    try:
        done = export_onnx(model, folder / "model.onnx", images, manifest={})
    except RobustPruneError as error:
        return {"onnx": False, "onnx_reason": str(error)}
    return {"onnx": True, "onnx_error": done.parity.onnx_error, "torch_error": done.parity.torch_error}


def measure_apart(arch: str, size: int, arm: str, limit: float) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--one", arch, "--size", str(size), "--arm", arm, "--out", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done within {limit:.0f} s"}
        if done.returncode or not out.exists():
            return {"failed": " ".join(done.stderr.strip().splitlines()[-1:])[:300] or f"exit {done.returncode}"}
        row: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, stored ones first."""
    stored = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"rows": {}}
    rows: dict[str, Any] = stored["rows"]
    wanted = {arch: size for arch, size in models().items() if not args.only or arch in args.only}
    for position, (arch, size) in enumerate(wanted.items(), start=1):
        if arch in rows and not args.only:
            continue
        row: dict[str, Any] = {"size": size}
        for arm in ARMS:
            row[arm] = measure_apart(arch, size, arm, args.limit)
        rows[arch] = row
        ordered = {name: rows[name] for name in models() if name in rows}
        write_json(args.out, {"ratio": RATIO, "limit": args.limit, "environment": snapshot(), "rows": ordered})
        console.print(f"{position}/{len(wanted)} {arch}: {_summary(row['ours'])}", markup=False)
    result: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
    return result


def _summary(half: dict[str, Any]) -> str:
    if "failed" in half:
        return f"failed: {half['failed']}"
    return (
        f"{half['groups'][0]} of {half['groups'][1]} groups, MACs {half['macs_kept']:.1%}, parity {half['parity']:.0e}"
        f", reload {half['reload']}, onnx {half['onnx']}, {half['seconds']:.0f} s {half['note']}"
    )


def support(result: dict[str, Any]) -> str:
    """The short table that the documentation shows."""
    lines = [
        "| architecture | groups cut | MACs kept | params kept | equal to masked | ONNX | torch-pruning alone |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    for arch, row in result["rows"].items():
        ours, plain = row["ours"], row["plain"]
        alone = "equal" if _sound(plain) else "runs, not equal" if plain.get("runs") else "does not run"
        cells = "failed | | | | " if "failed" in ours else " | ".join(_ours_cells(ours).split(" | ")[:3])
        proof = "" if "failed" in ours else f"{_yes(ours['parity'] < EQUAL)} | {_yes(ours['onnx'])}"
        lines.append(f"| {arch} | {cells} | {proof} | {alone} |")
    return "\n".join(lines) + "\n"


def in_page(page: str, result: dict[str, Any]) -> str:
    """`page` with its table and the count above it made anew."""
    rows = result["rows"].values()
    ours = sum(_kept_whole(row["ours"]) for row in rows)
    plain = sum(_sound(row["plain"]) for row in rows)
    said = (
        f"{ours} of {len(rows)} architectures come out smaller, equal and exportable; with torch-pruning's own pruner "
        f"{plain} run and are equal."
    )
    block = f"{BEGIN}\n\n<details><summary>{said}</summary>\n\n{MARK}\n\n{support(result)}\n</details>\n\n{END}"
    before, _, rest = page.partition(BEGIN)
    return before + block + rest.partition(END)[2]


def _kept_whole(ours: dict[str, Any]) -> bool:
    return "failed" not in ours and ours["parity"] < EQUAL and ours["reload"] and ours["onnx"]


def _sound(plain: dict[str, Any]) -> bool:
    return plain.get("parity") is not None and plain["parity"] < EQUAL


def table(result: dict[str, Any]) -> str:
    """Markdown of every column, and the reasons below."""
    environment = result["environment"]
    lines = [
        "# Architectures: half of the MACs\n",
        support(result),
        f"`benchmarks/zoo.py`, torch {environment['versions']['torch']}, timm {environment['versions']['timm']}, "
        f"torch-pruning {environment['versions']['torch-pruning']} on {environment['cpu']}, one thread. Parity: "
        "largest difference of the logits to those of the dense model with the same channels zeroed, relative. "
        "Backward: a training step's gradients are finite. Reload: the artifact gives bit-identical logits. ONNX: the "
        "file passes the export gate at batch 1, 3 and 8 against float64. The right half is torch-pruning's own pruner "
        f"at half of the channels; equal means parity below {EQUAL:g}.\n",
        "| model | input | groups cut | MACs kept | params kept | parity | backward | reload | ONNX | seconds | "
        "plain: groups | MACs kept | runs | equal | ONNX |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    reasons = []
    for arch, row in result["rows"].items():
        ours, plain = row["ours"], row["plain"]
        lines.append(f"| {arch} | {row['size']} | {_ours_cells(ours)} | {_plain_cells(plain)} |")
        told = [f"`{name}`: {reason}" for name, reason in ours.get("refused", {}).items()]
        told = ([ours["note"]] if ours.get("note") else []) + told
        if "failed" in ours:
            told = [ours["failed"]]
        if told:
            reasons.append(f"- **{arch}**: " + "; ".join(told))
    return "\n".join([*lines, "\n## What stayed whole, and why\n", *reasons]) + "\n"


def _ours_cells(half: dict[str, Any]) -> str:
    if "failed" in half:
        return "failed | | | | | | | "
    return (
        f"{half['groups'][0]} of {half['groups'][1]} | {half['macs_kept']:.1%} | {half['params_kept']:.1%} | "
        f"{half['parity']:.0e} | {_yes(half['backward'])} | {_yes(half['reload'])} | {_yes(half['onnx'])} | "
        f"{half['seconds']:.0f}"
    )


def _plain_cells(half: dict[str, Any]) -> str:
    if "failed" in half:
        return f"{'too slow' if 'not done' in half['failed'] else 'failed'} | | no | no | no"
    macs = f"{half['macs_kept']:.1%}" if "macs_kept" in half else ""
    proofs = (half["runs"], _sound(half), half.get("onnx", False))
    return f"{half['groups'] or ''} | {macs} | " + " | ".join(map(_yes, proofs))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=900, help="seconds a model may take")
    parser.add_argument("--only", nargs="+", choices=list(models()), metavar="ARCH", help="measure these (again)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "zoo.json")
    parser.add_argument("--report", action="store_true", help="draw the table of what is stored, measure nothing")
    parser.add_argument("--docs", action="store_true", help="write the short table into the documentation too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        write_json(args.out, measure(args.one, args.size, args.arm))
        return
    result = json.loads(args.out.read_text(encoding="utf-8")) if args.report else run(args)
    write_text(args.out.with_suffix(".md"), table(result))
    if args.docs:
        write_text(PAGE, in_page(PAGE.read_text(encoding="utf-8"), result))


if __name__ == "__main__":
    main()
