"""Share of a training step that waits for images on disk.

    python benchmarks/reading.py

A ResNet-18 of timm is trained by N-FGSM at 224 pixels on JPEG files: images of CIFAR-10, enlarged to 256 pixels, in
batches of 16. With 0 workers every batch is decoded within its step; others decode ahead. The share is the time between
asking for a batch and having it, divided by the time of the epoch, which includes the first batch, for which nothing
can be ready. Numbers of workers take turns in each round; medians and ranges are over rounds. Decoding costs little
beside a step on a CPU, and much on a GPU (`--device cuda`).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from PIL import Image

from robust_prune.attacks import ThreatModel
from robust_prune.console import console
from robust_prune.data.base import TensorImages, stratified
from robust_prune.data.folder import FolderImages
from robust_prune.data.sources import load_data
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe import TrainSettings
from robust_prune.runs.files import write_json, write_text
from robust_prune.training.trainer import train

SIDE, STORED, BATCH = 224, 256, 16
OUT = Path(__file__).parent / "results" / "reading.json"


def files(folder: Path, count: int) -> FolderImages:
    """Return `count` images of CIFAR-10 as JPEG files."""
    chosen = stratified(load_data("cifar10").train, count)
    x, labels = chosen.get(torch.arange(count))
    paths = []
    for number, image in enumerate(x):
        paths.append(folder / f"{number}.jpg")
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.resize((STORED, STORED), Image.Resampling.BICUBIC).save(paths[-1], quality=95)
    return FolderImages(tuple(paths), labels, (3, SIDE, SIDE))


def share_of_waiting(images: FolderImages, workers: int, device: str) -> tuple[float, float]:
    """Return the share of an epoch that waits for images, and the seconds of the epoch."""
    settings = TrainSettings(loss="n_fgsm", epochs=1, batch_size=BATCH, workers=workers, lr=0.01, ema_decay=0)
    nothing = TensorImages(torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    model = timm.create_model("resnet18", num_classes=10)
    (record,) = train(model, images, nothing, ThreatModel("linf", 4 / 255), settings, device=device).history
    return record.waited / record.seconds, record.seconds


def spread(values: list[float]) -> str:
    """Return the median with the range."""
    return f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tune_allocator()
    found: dict[int, list[tuple[float, float]]] = {workers: [] for workers in args.workers}
    with TemporaryDirectory() as folder:
        images = files(Path(folder), args.images)
        for number in range(args.rounds):
            for workers in args.workers:
                found[workers].append(share_of_waiting(images, workers, args.device))
                console.print(f"round {number + 1}, {workers} workers: {found[workers][-1][0]:.1%}", markup=False)
    machine = snapshot()
    rows = [
        {"workers": workers, "share": [share for share, _ in each], "seconds": [seconds for _, seconds in each]}
        for workers, each in found.items()
    ]
    write_json(args.out, {"rows": rows, "images": args.images, "batch": BATCH, "environment": machine})
    lines = [
        f"# Waiting for images\n\n`benchmarks/reading.py`, ResNet-18 at {SIDE} pixels, N-FGSM, {args.images} JPEG "
        f"files of {STORED} pixels in batches of {BATCH}, {torch.get_num_threads()} threads of {machine['cpu']} "
        f"({args.device}), commit {str(machine['commit'])[:7]}.\n",
        "| workers | waiting, % of the epoch | seconds of the epoch |",
        "| ---: | ---: | ---: |",
    ]
    for workers, each in found.items():
        waiting, seconds = spread([100 * share for share, _ in each]), spread([seconds for _, seconds in each])
        lines.append(f"| {workers} | {waiting} | {seconds} |")
    text = "\n".join(lines) + "\n"
    write_text(args.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
