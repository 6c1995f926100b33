"""How fast images on disk are read, and what share of training waits for them.

    python benchmarks/input.py

The images are photographs' stand-ins: images of CIFAR-10, enlarged to 500x375 pixels and stored as JPEG files.

- Reading alone: images per second of batches of 16 at 224 pixels, by centre crops and by random resized crops.
- Training: a ResNet-18 of timm learns by N-FGSM. The share is the time between asking for a batch and having it,
  divided by the time of the epoch, which includes the first batch, for which nothing can be ready. With 0 workers every
  batch is decoded within its step; others decode ahead; `memory` holds the same images as one tensor.

Arms take turns in each round; medians and ranges are over rounds. Decoding costs little beside a step on a CPU, and
much on a GPU (`--device cuda`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from PIL import Image

from robust_prune.attacks import ThreatModel
from robust_prune.console import console
from robust_prune.data.base import ImageSet, TensorImages, stratified
from robust_prune.data.crops import ResizedCrops
from robust_prune.data.folder import FolderImages
from robust_prune.data.sources import load_data
from robust_prune.machine.host import tune_allocator
from robust_prune.machine.snapshot import snapshot
from robust_prune.recipe import TrainSettings
from robust_prune.runs.files import write_json, write_text
from robust_prune.training.reading import reading
from robust_prune.training.trainer import train

SIDE, STORED, BATCH = 224, (500, 375), 16
CROPS = {"centre": None, "resized": 0.08}
OUT = Path(__file__).parent / "results" / "input.json"


def files(folder: Path, count: int) -> FolderImages:
    """Return `count` images of CIFAR-10 as JPEG files."""
    chosen = stratified(load_data("cifar10").train, count)
    x, labels = chosen.get(torch.arange(count))
    paths = []
    for number, image in enumerate(x):
        paths.append(folder / f"{number}.jpg")
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.resize(STORED, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return FolderImages(tuple(paths), labels, (3, SIDE, SIDE))


def images_per_second(images: ImageSet, workers: int, crop: float | None) -> float:
    """Return how many images are read in a second, from the first batch that is ready to the last."""
    shown = images if crop is None else ResizedCrops(images, (SIDE, SIDE), crop, 0, 0)
    batches = list(torch.arange(len(images)).split(BATCH))
    with reading(shown, batches, torch.device("cpu"), workers) as ready:
        seen = len(next(ready)[1])
        begin = time.monotonic()
        for _, y in ready:
            seen += len(y)
        return (seen - BATCH) / (time.monotonic() - begin)


def share_of_waiting(images: ImageSet, workers: int, device: str) -> tuple[float, float]:
    """Return the share of an epoch that waits for images, and the seconds of the epoch."""
    settings = TrainSettings(
        loss="n_fgsm", epochs=1, batch_size=BATCH, workers=workers, lr=0.01, ema_decay=0, resized_crop=CROPS["resized"]
    )
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
    alone: dict[tuple[str, int], list[float]] = {}
    trained: dict[str, list[tuple[float, float]]] = {}
    with TemporaryDirectory() as folder:
        images = files(Path(folder), args.images)
        held = TensorImages(*images.get(torch.arange(len(images))))
        arms: list[tuple[str, ImageSet, int]] = [(str(workers), images, workers) for workers in args.workers]
        for number in range(args.rounds):
            for crop, smallest in CROPS.items():
                for workers in args.workers:
                    alone.setdefault((crop, workers), []).append(images_per_second(images, workers, smallest))
            for name, source, workers in [*arms, ("memory", held, 0)]:
                trained.setdefault(name, []).append(share_of_waiting(source, workers, args.device))
                console.print(f"round {number + 1}, {name}: {trained[name][-1][0]:.1%} waiting", markup=False)
    result: dict[str, Any] = {
        "reading": [{"crop": crop, "workers": workers, "per_second": each} for (crop, workers), each in alone.items()],
        "training": [
            {"workers": name, "share": [share for share, _ in each], "seconds": [seconds for _, seconds in each]}
            for name, each in trained.items()
        ],
        "images": args.images, "batch": BATCH, "threads": torch.get_num_threads(), "device": args.device,
        "environment": snapshot(),
    }  # fmt: skip
    write_json(args.out, result)
    text = report(result)
    write_text(args.out.with_suffix(".md"), text)
    print(text)


def report(result: dict[str, Any]) -> str:
    """Return the tables of a result as Markdown."""
    machine = result["environment"]
    lines = [
        f"# Reading images\n\n`benchmarks/input.py`: {result['images']} JPEG files of {STORED[0]}x{STORED[1]} pixels, "
        f"read at {SIDE} pixels in batches of {result['batch']}; ResNet-18, N-FGSM, {result['threads']} threads of "
        f"{machine['cpu']} ({result['device']}), {machine['cores']} cores, commit {str(machine['commit'])[:7]}. Median "
        "and range of the rounds.\n",
        "| crop | workers | images / s, reading alone |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {row['crop']} | {row['workers']} | {spread(row['per_second'])} |" for row in result["reading"]]
    lines += ["", "| workers | waiting, % of the epoch | seconds of the epoch |", "| ---: | ---: | ---: |"]
    for row in result["training"]:
        share, seconds = spread([100 * share for share in row["share"]]), spread(row["seconds"])
        lines.append(f"| {row['workers']} | {share} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
