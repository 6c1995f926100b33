"""Draws the embedded sample from CIFAR-10, and stores the demo model; both are part of the package.

    python benchmarks/make_sample.py cifar10.npz
    python benchmarks/make_sample.py --model runs/cifar10-resnet20x2/model.safetensors

The .npz contains x_train, y_train, x_test, y_test in the official order (uint8 [N, H, W, C]). Training images are from
the official training split and test images from the official test split; the same number of each class is drawn with a
fixed seed, and the positions are stored with the images. Matrices and kernels of the model are stored in half precision
to keep the package small; the demo is the rounded model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import robust_prune.data.sample as sample
from robust_prune.data.npz import load_npz
from robust_prune.models import artifact
from robust_prune.runs.files import atomic_write

SEED = 20241015
PER_CLASS = {"train": 200, "test": 50}


def draw(labels: np.ndarray, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """Return the sorted positions of `per_class` random images of every class."""
    chosen = [generator.choice(np.flatnonzero(labels == k), per_class, replace=False) for k in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def store_model(source: Path, target: Path) -> None:
    """Write the model of artifact `source` in half precision."""
    loaded = artifact.load(source)
    artifact.save(
        target, loaded.module, loaded.spec, threat=loaded.threat, provenance=loaded.provenance, store_dtype="float16"
    )
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


def store_images(source: Path, target: Path) -> None:
    """Draw and compress images of `source`."""
    bundle = load_npz(source.expanduser())
    generator = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for part, images in (("train", bundle.train), ("test", bundle.test)):
        pixels = images.images.permute(0, 2, 3, 1).numpy()
        labels = images.labels.numpy()
        index = draw(labels, PER_CLASS[part], generator)
        coded = sample.encode(pixels[index])
        if not np.array_equal(sample.decode(coded, len(index)), pixels[index]):
            raise SystemExit("the coding is not lossless; nothing was written")
        arrays[f"coded_{part}"] = np.frombuffer(coded, np.uint8)
        arrays[f"y_{part}"] = labels[index].astype(np.uint8)
        arrays[f"index_{part}"] = index.astype(np.int32)

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, **arrays)

    atomic_write(target, write)
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="CIFAR-10 as .npz")
    parser.add_argument("--model", type=Path, help="a trained artifact, to become the demo model")
    folder = Path(sample.__file__).parent / "sample"
    parser.add_argument("--out", type=Path, default=folder)
    arguments = parser.parse_args()
    if arguments.source is None and arguments.model is None:
        parser.error("name the .npz, --model, or both")
    if arguments.model is not None:
        store_model(arguments.model, arguments.out / "demo.safetensors")
    if arguments.source is not None:
        store_images(arguments.source, arguments.out / sample.FILE)


if __name__ == "__main__":
    main()
