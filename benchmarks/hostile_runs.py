"""Runs of `train` and `compress` that are killed, starved, damaged, shared or given other inputs, and then finished.

A finished run must have the weights, the ONNX files and the correct images of one that nothing happened to, and hold
the same files; no process of a killed run may live on. What cannot be finished must be refused in one line. Runs are
tiny: a narrow ResNet-20 on the embedded sample, with every stage and an int8 file. By turns they train in the precision
that the program chooses (``auto``) and in fp32, and write a checkpoint after every step and once a minute. All
processes are forks of one that has imported the packages.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.torch
import torch

from robust_prune import cli
from robust_prune.data.sources import load_data
from robust_prune.errors import UsageError
from robust_prune.training import trainer

RECIPE = """\
model: {{arch: cifar/resnet20_x0.25}}
training: {{precision: {precision}, loss: n_fgsm, epochs: 2, batch_size: 64, lr: 0.05, validation_images: 32}}
sensitivity: {{images: 32, steps: 2}}
pruning: {{ratio: 0.5, round_to: 1, repair_images: 32}}
finetune: {{precision: {precision}, loss: n_fgsm, epochs: 1, batch_size: 64, lr: 0.02, validation_images: 32}}
export: {{precisions: [int8]}}
evaluation: {{steps: 5, restarts: 2, images: 64}}
bench: {{batches: [1], seconds: 0.1, kinds: [host]}}
"""
VERBS, PRECISIONS, CHECKPOINT_SECONDS = ("train", "compress"), ("auto", "fp32"), (0.0, 60.0)
STAGES = {
    "train": ("preflight", "train", "evaluate", "report"),
    "compress": (
        "preflight", "export-dense", "dense", "plan", "prune", "finetune", "export-pruned", "export-pruned-reduced",
        "evaluate-dense", "evaluate-pruned", "bench", "report",
    ),
}  # fmt: skip
"""Stages of both commands, in the order in which they end."""
IMAGES, TEST_IMAGES = 600, 100
FORKS = multiprocessing.get_context("forkserver")
# The server of forks has imported all packages and computed nothing: torch does not survive a fork afterwards.
FORKS.set_forkserver_preload(["hostile_runs", "robust_prune.compression", "robust_prune.train"])


class Failure(Exception):
    """What must not happen."""


def command(line: list[str], log: Path, checkpoint_seconds: float, limit: tuple[int, int] | None, work: Path) -> None:
    """Run a command line in this process, which ends with its exit code."""
    quiet, written = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, target in enumerate((quiet, written, written)):
        os.dup2(target, stream)
    # Decisions on precision must be the same for all runs, and those of the user stay as they are.
    os.environ["ROBUST_PRUNE_CACHE"] = str(work / "cache")
    torch.set_num_threads(1)
    trainer.CHECKPOINT_SECONDS = checkpoint_seconds
    if limit:
        resource.setrlimit(limit[0], (limit[1], limit[1]))
    cli.main(line)


def outcome(folder: Path) -> dict[str, Any]:
    """Return hashes of weights and ONNX files, the correct images, and the names of all files of a finished run."""
    # A checkpoint of a finished stage is needed for nothing, and not made again.
    paths = [path for path in folder.rglob("*") if path.name != "checkpoint.pt"]
    found: dict[str, Any] = {"files": sorted(str(path.relative_to(folder)) for path in paths)}
    for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items():
        found[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    for file in sorted(folder.glob("*.onnx")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for row in json.loads((folder / "result.json").read_text(encoding="utf-8"))["models"]:
        card = row["card"]
        found[row["label"]] = card and [card["clean"]["correct"], card["robust"]["correct"], card["exported"]]
    return found


class Runs:
    """Runs to which nothing happens, and the way to start more of them: the base of the kinds below.

    Attributes:
        folder: the run folder of the run at hand.
        verb, precision, checkpoint_seconds: what the run at hand is.
        where: number of runs by the stage in which something happened to them.
    """

    slow_seconds = 600.0

    def __init__(self, work: Path) -> None:
        self.work, self.folder, self.log = work, work / "run", work / "log.txt"
        self.verb, self.precision, self.checkpoint_seconds, self.turn = "", "", 0.0, 0
        self.where: Counter[str] = Counter()
        self.write_data(work / "data.npz", 0)
        for precision in PRECISIONS:
            (work / f"{precision}.yaml").write_text(RECIPE.format(precision=precision), encoding="utf-8")
            self.train(precision, 0, work / f"{precision}.safetensors")
        self.whole: dict[tuple[str, str], tuple[dict[str, Any], float]] = {}
        for precision in PRECISIONS:
            for verb in VERBS:
                self.verb, self.precision, self.folder = verb, precision, self.finished(verb, precision)
                begin = time.monotonic()
                if self.run():
                    raise Failure(self.log.read_text(encoding="utf-8"))
                self.whole[verb, precision] = outcome(self.folder), time.monotonic() - begin
        self.folder = work / "run"

    def finished(self, verb: str, precision: str) -> Path:
        """Return the folder of the run that nothing happened to."""
        return self.work / f"{verb}-{precision}"

    def write_data(self, file: Path, changed: int) -> None:
        """Write some images of the embedded sample; the first `changed` training labels are the next class."""
        arrays: dict[str, Any] = {}
        data = load_data("sample")
        for part, images, count in (("train", data.train, IMAGES), ("test", data.test, TEST_IMAGES)):
            x, y = images.get(torch.arange(count))
            arrays[f"x_{part}"], arrays[f"y_{part}"] = x.permute(0, 2, 3, 1).numpy(), y.numpy()
        arrays["y_train"][:changed] = (arrays["y_train"][:changed] + 1) % 10
        np.savez(file, **arrays)

    def train(self, precision: str, seed: int, file: Path) -> None:
        """Train a model to be compressed."""
        self.verb, self.precision, self.folder = "train", precision, self.work / "base"
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.run(arguments=["--seed", str(seed)]):
            raise Failure(self.log.read_text(encoding="utf-8"))
        shutil.copyfile(self.folder / "model.safetensors", file)

    def start(self, limit: tuple[int, int] | None = None, arguments: Sequence[str] = ()) -> BaseProcess:
        """Start the run at hand, under a limit (number of the resource, amount), and return its process."""
        model = [] if self.verb == "train" else [str(self.work / f"{self.precision}.safetensors")]
        line = [
            self.verb, *model, "--recipe", str(self.work / f"{self.precision}.yaml"),
            "--data", str(self.work / "data.npz"), "--out", str(self.folder), *arguments,
        ]  # fmt: skip
        process = FORKS.Process(target=command, args=(line, self.log, self.checkpoint_seconds, limit, self.work))
        process.start()
        return process

    def run(self, **given: Any) -> int:
        """Start the run at hand, wait for its end, and return its exit code."""
        process = self.start(**given)
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def next_kind(self) -> None:
        """Take the next verb, precision and time between checkpoints, and remove the former run folder."""
        self.verb, self.precision = VERBS[self.turn % 2], PRECISIONS[self.turn // 2 % 2]
        self.checkpoint_seconds = CHECKPOINT_SECONDS[self.turn // 4 % 2]
        self.turn += 1
        shutil.rmtree(self.folder, ignore_errors=True)

    def note_stage(self) -> None:
        """Count the stage in which the run at hand is."""
        left = [name for name in STAGES[self.verb] if not (self.folder / name / "stage.json").exists()]
        self.where[f"{self.verb}, {left[0] if left else 'end'}"] += 1

    def said(self) -> str:
        """Return the error line of the last command; raise if it said anything else on its way out."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.startswith("error")]
        if len(lines) != 1 or "Traceback" in text or "error in robust-prune itself" in text:
            raise Failure(f"no single line: {text[-300:]}")
        return lines[0]

    def finish(self) -> bool:
        """Finish the run, and raise if its outcome is not that of the run that nothing happened to."""
        if self.run():
            raise UsageError(self.said())
        found, expected = outcome(self.folder), self.whole[self.verb, self.precision][0]
        if found != expected:
            raise Failure(f"differs: {[key for key in expected | found if found.get(key) != expected.get(key)]}")
        return True


class Killed(Runs):
    """Runs that end by SIGKILL at a random moment."""

    what = "by the stage in which they were"

    def make(self, rng: random.Random) -> None:
        """Start a run and kill it, once more if it ended before."""
        self.next_kind()
        seconds = self.whole[self.verb, self.precision][1]
        while True:
            shutil.rmtree(self.folder, ignore_errors=True)
            process = self.start()
            time.sleep(rng.uniform(0, seconds))
            with suppress(psutil.NoSuchProcess):
                self.workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                break
        self.note_stage()

    workers: Sequence[psutil.Process] = ()

    def open(self) -> bool:
        """Finish the run; it must not be refused."""
        try:
            same = self.finish()
        except UsageError as error:
            raise Failure(f"not resumed: {error}") from error
        if any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in self.workers):
            raise Failure("a process of the killed run is still there")
        return same


class Starved(Killed):
    """Runs that may not write files above a random size (as on a full disk), or have little memory."""

    what = "by the stage in which they were"

    def make(self, rng: random.Random) -> None:
        """Start a run under a limit and wait until it ends."""
        self.next_kind()
        limit, amount = resource.RLIMIT_FSIZE, int(10 ** rng.uniform(2, 5.3))
        if self.turn // 2 % 2:
            amount = int(rng.uniform(1.5, 6) * (1 << 30))
            limit = resource.RLIMIT_AS
        code = self.run(limit=(limit, amount))
        self.note_stage()
        if code:
            self.said()


class Damaged(Runs):
    """Finished runs of which a file is changed, cut off or gone."""

    what = "by the file"

    def make(self, rng: random.Random) -> None:
        """Damage a file of a copy of a finished run."""
        self.next_kind()
        shutil.copytree(self.finished(self.verb, self.precision), self.folder)
        file = rng.choice(sorted(path for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size))
        data = bytearray(file.read_bytes())
        how = rng.randrange(3)
        if how == 0:
            file.unlink()
        elif how == 1:
            file.write_bytes(data[: rng.randrange(len(data))])
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        self.where[file.name] += 1

    def open(self) -> bool:
        """Run the command again, or be refused."""
        return self.finish()


class Shared(Runs):
    """Runs of which a second process starts while the first is at work."""

    what = "by the stage in which the second process came"

    def make(self, rng: random.Random) -> None:
        """Start both, and raise if the second one does anything but refuse."""
        self.next_kind()
        first = self.start()
        while not (self.folder / "run.json").exists() and first.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, self.whole[self.verb, self.precision][1] / 2))
        self.note_stage()
        self.log, log = self.work / "second.txt", self.log
        try:
            code = self.run()
            said = self.said() if code else "went on"
        finally:
            self.log = log
        if f"process {first.pid} " not in said:
            raise Failure(f"the second process: {said}")
        first.join()
        if first.exitcode:
            raise Failure("the first process failed")

    def open(self) -> bool:
        """Look at what the first one made."""
        return self.finish()


class Changed(Runs):
    """Unfinished runs whose model, recipe, labels or pixels have changed since."""

    what = "by what changed"

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.originals = {path: path.read_bytes() for path in work.iterdir() if path.is_file() and path != self.log}
        for precision in PRECISIONS:
            self.train(precision, 1, work / f"{precision}.other")
        self.folder = work / "run"

    def make(self, rng: random.Random) -> None:
        """Take the last stages of a finished run away, and change an input."""
        self.next_kind()
        shutil.copytree(self.finished(self.verb, self.precision), self.folder)
        kept = rng.randrange(1, len(STAGES[self.verb]))
        for name in STAGES[self.verb][kept:]:
            shutil.rmtree(self.folder / name)
        (self.folder / "result.json").unlink()
        kinds = ("data", "recipe") if self.verb == "train" else ("data", "recipe", "model")
        self.changed = rng.choice(kinds)
        self.where[f"{self.verb}, {self.changed}"] += 1
        if self.changed == "data":
            self.write_data(self.work / "data.npz", rng.choice((1, 300)))
        elif self.changed == "recipe":
            text = RECIPE.format(precision=self.precision)
            (self.work / f"{self.precision}.yaml").write_text(text.replace("batch_size: 64", "batch_size: 48"))
        else:
            shutil.copyfile(
                self.work / f"{self.precision}.other", self.work / f"{self.precision}.safetensors"
            )  # fmt: skip

    def open(self) -> bool:
        """Run the command again: it must name what changed."""
        code = self.run()
        for path, data in self.originals.items():
            path.write_bytes(data)
        if not code:
            return False
        if f"another {self.changed}" not in self.said():
            raise Failure(f"{self.changed} changed, said: {self.said()}")
        raise UsageError(self.said())
