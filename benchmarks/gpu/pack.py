"""Packs files that the GPU machine lacks into parcels, and prints the commands that use them, in order.

    python benchmarks/gpu/pack.py gpu-parcels

`machine.json` describes the machine: its Python and its installed packages. The parcels contain wheels of the other
requirements of robust-prune (in the versions installed here), onnxruntime-gpu among them; graphs of dense and pruned
models without weights; CIFAR-10; and with `--base` the model of an earlier job. Git should ignore the folder. Copy one
parcel after the other together with the checkout, and run its command there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import images  # noqa: E402
import numpy as np  # noqa: E402
import parcels  # noqa: E402
import torch  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402
from sizes import GPU, TOY, Sizes  # noqa: E402
from skeletons import strip  # noqa: E402

from robust_prune.budget.analysis import Analysis  # noqa: E402
from robust_prune.budget.cost import cost_model  # noqa: E402
from robust_prune.budget.plan import make_plan  # noqa: E402
from robust_prune.data.sources import data_root, load_data  # noqa: E402
from robust_prune.exporters.onnx import export_onnx  # noqa: E402
from robust_prune.exporters.precision import export_reduced  # noqa: E402
from robust_prune.machine.host import git_commit  # noqa: E402
from robust_prune.models import registry  # noqa: E402
from robust_prune.ranking.importance import channel_scores  # noqa: E402
from robust_prune.recipe import PruningSection  # noqa: E402
from robust_prune.structure.groups import find_groups  # noqa: E402
from robust_prune.surgery.apply import apply  # noqa: E402

LIMIT_MIB = 52
"""Largest size of a parcel in MiB; a copy may have 64 MiB, including the checkout."""
CUTS = {"50 %": 0.5, "25 %": 0.75}
"""Kept share of the MACs, and the ratio to remove."""
START_SECONDS, COPY_SECONDS = 60, 8
"""Seconds to start a machine, and to copy a parcel."""


def wanted_wheels(machine: dict[str, Any]) -> dict[str, str]:
    """Return name and installed version of every package that robust-prune needs and the machine lacks."""
    there = {canonicalize_name(name) for name in (*machine["packages"], *machine["left_out"])}
    marks = {
        "python_version": machine["python"], "python_full_version": f"{machine['python']}.0", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython", "os_name": "posix",
        "platform_python_implementation": "CPython", "extra": "",
    }  # fmt: skip
    found: dict[str, str] = {}
    queue = ["robust-prune"]
    while queue:
        for text in importlib.metadata.requires(queue.pop()) or ():
            need = Requirement(text)
            name = canonicalize_name(need.name)
            if name in there or name in found or (need.marker is not None and not need.marker.evaluate(marks)):
                continue
            found[name] = importlib.metadata.version(name)
            queue.append(name)
    return found


def download(wheels: dict[str, str], machine: dict[str, Any], folder: Path) -> list[Path]:
    """Download missing wheels for the machine's Python to `folder`, and return all of them, smallest first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in wheels.items():
        stem = f"{name.replace('-', '_')}-{version}-"
        if any(path.name.lower().startswith(stem) and _fits(path, machine) for path in folder.glob("*.whl")):
            continue
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", machine["python"], "--implementation", "cp", "--dest", str(folder)]
        command += [part for platform in machine["platforms"] for part in ("--platform", platform)]
        if subprocess.run([*command, f"{name}=={version}"]).returncode:
            raise SystemExit(f"no wheel of {name} {version} for Python {machine['python']}: see above.")
    chosen = [path for path in folder.glob("*.whl") if _fits(path, machine)]
    # The largest wheel is last, so that the first parcel completes the small ones.
    return sorted(chosen, key=lambda path: path.stat().st_size)


def _fits(wheel: Path, machine: dict[str, Any]) -> bool:
    tags = wheel.stem.split("-")[-3]
    return tags.startswith("py") or f"cp{machine['python'].replace('.', '')}" in tags.split(".")


def make_skeletons(sizes: Sizes, folder: Path) -> Path:
    """Export every architecture, dense and pruned, in fp32 and fp16, without weights, to one zip."""
    for arch, side in sizes.architectures:
        target = folder / arch.replace("/", "-")
        labels = [f"{cut}{half}" for cut in ("dense", *CUTS) for half in ("", " fp16")]
        if all((target / f"{label}.onnx").exists() for label in labels):
            continue
        print(f"exporting {arch}", flush=True)
        target.mkdir(parents=True, exist_ok=True)
        spec = registry.make_spec(arch, num_classes=10, input_size=(3, side, side), mean=(0.5,) * 3, std=(0.25,) * 3)
        torch.manual_seed(0)
        dense = registry.build(spec).eval()
        example = spec.blank_image()
        search = find_groups(dense, example)
        cost, scores = cost_model(dense, example, search.groups), channel_scores(dense, search.groups, "magnitude")
        models = {"dense": dense}
        for label, ratio in CUTS.items():
            plan = make_plan(
                Analysis(search, cost, None, scores),
                PruningSection(ratio=ratio, allocation="uniform", criterion="magnitude"),
            )
            models[label] = apply(dense, plan, example).model
        noise = torch.rand(16, *spec.input_size, generator=torch.Generator().manual_seed(0))
        with TemporaryDirectory() as scratch:
            for label, model in models.items():
                whole, half = Path(scratch) / "model.onnx", Path(scratch) / "half.onnx"
                export_onnx(model, whole, noise, manifest={})
                export_reduced(whole, half, "fp16", model, noise)
                strip(whole, target / f"{label}.onnx")
                strip(half, target / f"{label} fp16.onnx")
    path = folder / "skeletons.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for arch, _ in sizes.architectures:
            for file in sorted((folder / arch.replace("/", "-")).glob("*.onnx")):
                archive.write(file, f"{file.parent.name}/{file.name}")
    return path


def pack_images(source: Path, folder: Path) -> Path:
    """Write the zip of CIFAR-10 sheets, after checking that it contains the same images."""
    target = folder / f"{source.stem}.zip"
    try:
        images.pack(source, target)
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"{source} is no .npz of x_train, y_train, x_test, y_test (uint8 NHWC): {error}") from error
    with (
        TemporaryDirectory() as scratch,
        np.load(images.unpack(target, Path(scratch))) as back,
        np.load(source) as given,
    ):
        if not all(np.array_equal(back[name], given[name]) for name in given.files):
            raise SystemExit("the sheets are not the images that were packed")
    return target


def toy_images(folder: Path) -> Path:
    """Write the embedded sample as ``cifar10.npz``, on which the rehearsal trains."""
    data = load_data("sample")
    arrays = {}
    for split, part in (("train", data.train), ("test", data.test)):
        x, y = part.get(torch.arange(len(part)))
        arrays |= {f"x_{split}": x.permute(0, 2, 3, 1).numpy(), f"y_{split}": y.numpy().astype(np.uint8)}
    np.savez(folder / "cifar10.npz", **arrays)
    return folder / "cifar10.npz"


def calls(folder: Path, items: list[parcels.Item], sizes: Sizes, toy: bool) -> list[tuple[str, float, str]]:
    """Returns, in order, the folder to copy, the planned seconds, and the command to run."""
    last = {
        kind: max((p for i in items if i.kind == kind for p in i.pieces), default=0) for kind in ("wheel", "images")
    }
    flag, seconds, found = " --toy" * toy, sizes.seconds, []
    before = ("facts", "latency", "speed")
    for number in range(1, max(p for item in items for p in item.pieces) + 1):
        command = f"python3 benchmarks/gpu/job.py take {folder}/parcel-{number}"
        planned = COPY_SECONDS + (START_SECONDS if number == 1 else 0)
        if number == last["wheel"]:
            command += f" && python3 benchmarks/gpu/job.py run{flag} --phases {','.join(before)} --out OUT"
            planned += sum(seconds[phase] for phase in before)
        found.append((f"{folder}/parcel-{number}", planned, command))
    rest = f"python3 benchmarks/gpu/job.py run{flag} --out OUT"
    where, planned, command = found[-1]
    after = sum(value for phase, value in seconds.items() if phase not in before)
    found[-1] = (where, planned + after, f"{command} && {rest}")
    return found


def main() -> None:
    """Pack the parcels and print the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the parcels")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz; by default where robust-prune keeps its data")
    parser.add_argument("--base", type=Path, help="a base that came back (its parts joined), for phase compression")
    parser.add_argument("--python", help="another Python version than the machine's, e.g. this one's to rehearse")
    parser.add_argument("--toy", action="store_true", help="what the rehearsal needs")
    args = parser.parse_args()
    sizes, machine = TOY if args.toy else GPU, json.loads((HERE / "machine.json").read_text(encoding="utf-8"))
    machine["python"] = args.python or machine["python"]
    if args.base and not args.base.is_file():
        parser.error(f"--base {args.base} does not exist")
    made = args.out / "made"
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{args.out} cannot be a folder: {error.strerror}")
    source = args.data or (toy_images(made) if args.toy else data_root() / "cifar10.npz")
    if not source.is_file():
        raise SystemExit(
            f"{source} does not exist. Name CIFAR-10 with --data: an .npz with x_train, y_train, x_test, y_test."
        )
    files = [("wheel", path) for path in download(wanted_wheels(machine), machine, made / "wheels")]
    files.insert(0, ("skeletons", make_skeletons(sizes, made / "skeletons")))
    files.append(("images", pack_images(source, made)))
    if args.base:
        shutil.copy(args.base, made / "base.safetensors")
        files.append(("base", made / "base.safetensors"))
    items = parcels.split(files, args.out, LIMIT_MIB * 2**20, git_commit() or "")
    for item in items:
        print(f"{item.kind:10} {item.bytes / 2**20:8.2f} MiB  {item.name}")
    total = 0.0
    for number, (where, planned, command) in enumerate(calls(args.out, items, sizes, args.toy), start=1):
        size = sum(path.stat().st_size for path in Path(where).iterdir()) / 2**20
        total += planned
        print(f"\n{number}. copy {where} ({size:.1f} MiB), then within {planned:.0f} s:\n{command}")
    print(f"\nPlanned in all: {total:.0f} s ({total / 60:.1f} minutes).")


if __name__ == "__main__":
    main()
