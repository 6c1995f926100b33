"""Images on disk are read ahead by worker processes, and training learns from them what it learns from memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders.places import TESTS
from builders.training_sample import THREAT, Killed, make_images, make_model, make_settings, weights_of
from PIL import Image
from torch import Tensor

from robust_prune.data.base import TensorImages
from robust_prune.data.folder import FolderImages
from robust_prune.errors import EnvironmentProblem, UsageError
from robust_prune.training import reading as readers
from robust_prune.training import trainer
from robust_prune.training.reading import default_workers, reading
from robust_prune.training.trainer import train

CPU = torch.device("cpu")


def on_disk(images: TensorImages, folder: Path) -> FolderImages:
    """The same images as lossless files."""
    paths = []
    for number, image in enumerate(images.images):
        paths.append(folder / f"{number:03}.png")
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(paths[-1])
    return FolderImages(tuple(paths), images.labels, tuple(images.images.shape[1:]))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    return on_disk(make_images(96), tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(("workers", "crop"), [(0, None), (2, None), (0, 0.3), (2, 0.3)])
def test_a_folder_teaches_what_memory_does_resumed_or_not(
    workers: int, crop: float | None, files: FolderImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(loss="n_fgsm", epochs=2, precision="fp32", workers=workers, resized_crop=crop)
    held_out = make_images(30, 1)
    wanted, whole, resumed = make_model(), make_model(), make_model()
    train(wanted, make_images(96), held_out, THREAT, settings)
    train(whole, files, held_out, THREAT, settings)
    real, steps = trainer._Run._step, 0

    def step(self: trainer._Run, x: Tensor, y: Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Killed
        real(self, x, y)

    monkeypatch.setattr(trainer._Run, "_step", step)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        train(make_model(), files, held_out, THREAT, settings, checkpoint=checkpoint)
    train(resumed, files, held_out, THREAT, settings, checkpoint=checkpoint)
    for name, value in weights_of(wanted).items():
        assert torch.equal(weights_of(whole)[name], value) and torch.equal(weights_of(resumed)[name], value), name


def test_batches_come_in_order_from_any_number_of_workers(files: FolderImages) -> None:
    batches = list(torch.randperm(96, generator=torch.Generator().manual_seed(0)).split(7))
    for workers in (0, 1, 3):
        with reading(files, batches, CPU, workers) as ready:
            for indices, (x, y) in zip(batches, ready, strict=True):
                assert torch.equal(x, make_images(96).images[indices]) and torch.equal(y, files.labels[indices])


def test_another_number_of_workers_resumes_the_same_training(files: FolderImages, tmp_path: Path) -> None:
    held_out, checkpoint = make_images(30, 1), tmp_path / "checkpoint.pt"
    one, other = make_model(), make_model()
    train(one, files, held_out, THREAT, make_settings(workers=0), checkpoint=checkpoint)
    written = checkpoint.stat().st_mtime_ns
    train(other, files, held_out, THREAT, make_settings(workers=1), checkpoint=checkpoint)
    assert checkpoint.stat().st_mtime_ns >= written
    assert all(torch.equal(value, weights_of(other)[name]) for name, value in weights_of(one).items())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(workers: int, tmp_path: Path) -> None:
    images = on_disk(make_images(12), tmp_path)
    images.paths[9].write_bytes(b"no image")
    batches = list(torch.arange(12).split(4))
    with pytest.raises(UsageError) as error, reading(images, batches, CPU, workers) as ready:
        list(ready)
    assert str(error.value).startswith(f"cannot decode the image {images.paths[9]}: ") and "\n" not in str(error.value)


def test_a_worker_that_is_killed_is_said_with_what_helps(files: FolderImages) -> None:
    parent = os.getpid()

    class Deadly(FolderImages):
        def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            if os.getpid() != parent and int(indices[0]) > 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().get(indices)

    images, batches = Deadly(files.paths, files.labels, files.input_size), list(torch.arange(32).split(4))
    with (
        pytest.raises(EnvironmentProblem, match=r"a process that reads images ended .*set training\.workers"),
        reading(images, batches, CPU, 1) as ready,
    ):
        next(ready)
        for _ in range(200):  # torch may notice it while a step runs
            time.sleep(0.05)


SCRIPT = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from builders.places import TESTS
from builders.training_sample import THREAT, make_images, make_model, make_settings
from robust_prune.data.folder import FolderImages
from robust_prune.interruption import interruptible
from robust_prune.training.trainer import train
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
images = make_images(96)
files = FolderImages(tuple(sorted(Path({folder!r}).glob("*.png"))), images.labels, (3, 8, 8))
settings = make_settings(loss="n_fgsm", epochs=100000, precision="fp32", workers=2, validation_images=0)
threading.Timer({delay}, lambda: os.kill({target}, signal.{name})).start()
with interruptible():
    try:
        train(make_model(), files, make_images(0), THREAT, settings)
    except KeyboardInterrupt as stop:
        print("stopped by", type(stop).__name__)
"""


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_ends_training_whenever_it_comes(name: str, number: int, files: FolderImages) -> None:
    """Epochs of 6 steps end and begin all the time, and with them the workers."""
    target = "0" if name == "SIGINT" else "os.getpid()"  # a terminal tells all processes of its group
    script = SCRIPT.format(
        tests=str(TESTS), folder=str(files.paths[0].parent), delay=2 + 0.11 * number, target=target, name=name
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, start_new_session=True, check=False
    )
    stopped = {"SIGINT": "KeyboardInterrupt", "SIGTERM": "Terminated"}[name]
    assert f"stopped by {stopped}" in done.stdout, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr[-2000:]


def test_workers_are_half_of_the_cores_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, wanted in ((2, 1, 1), (16, 1, 8), (64, 1, 8), (64, 8, 4), (1, 1, 1), (4, 8, 1)):
        monkeypatch.setattr(readers, "usable_cores", lambda cores=cores: cores)
        assert default_workers(processes) == wanted


def test_waiting_for_images_is_measured_and_said(
    files: FolderImages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "LONG_WAIT", 0.0)
    result = train(make_model(), files, make_images(30, 1), THREAT, make_settings(epochs=2, workers=1))
    assert all(0 < record.waited < record.seconds for record in result.history)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("% of the first epoch went by while images were read, by 1 process: see training.workers") == 1
