"""Dense robust base model: PGD adversarial training with weight averaging, for as many epochs as time allows."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from sizes import Sizes
from torch import nn
from training import COMPILED
from work import Work

from robust_prune.attacks import ThreatModel
from robust_prune.data.base import ImageSet, random_subset, stratified
from robust_prune.data.sources import load_data
from robust_prune.machine.snapshot import snapshot
from robust_prune.models import artifact, registry
from robust_prune.models.spec import ModelSpec
from robust_prune.recipe import TrainSettings
from robust_prune.runs.files import read_json, write_json
from robust_prune.training.trainer import train

THREAT = ThreatModel("linf", 8 / 255)
TIMED_STEPS = 20
KEEP_SECONDS = 60.0
SHARE = 0.85
"""Share of the remaining time for training; the rest is for validation and for writing."""


def run(work: Work, sizes: Sizes, deadline: float) -> None:
    """Train the base model from scratch, or from the weights of an earlier job."""
    data = load_data("cifar10")
    settings = TrainSettings(**{key: value for key, value in sizes.base.items() if key != "arch"})
    spec = registry.make_spec(
        sizes.base["arch"], num_classes=data.num_classes, input_size=data.input_size, mean=data.mean, std=data.std,
        class_names=data.class_names,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = artifact.load(work.base).module if work.base.exists() else registry.build(spec)
    images = random_subset(data.train, sizes.train_images, 0)
    checkpoint, plan = work.root / "base" / "checkpoint.pt", work.root / "base" / "plan.json"
    if not plan.exists():
        compile = _compile_pays(work, deadline)
        settings = settings.model_copy(update={"compile": "on" if compile else "off"})
        seconds = _seconds_an_epoch(model, images, settings, sizes.device)
        left = SHARE * (deadline - time.monotonic())
        epochs = max(1, min(sizes.most_epochs, int(left / seconds)))
        write_json(plan, {"epochs": epochs, "compile": settings.compile, "seconds_an_epoch": seconds})
    planned = read_json(plan)
    settings = settings.model_copy(update={"epochs": planned["epochs"], "compile": planned["compile"]})
    found = {
        "arch": spec.arch, "continued": work.base.exists(), "plan": planned, "train_images": len(images),
        "settings": settings.model_dump(mode="json"), "environment": snapshot(),
    }  # fmt: skip
    work.save("base", found)
    with _kept(work, checkpoint, spec):
        result = train(
        model, images, data.validation, THREAT, settings, device=sizes.device, checkpoint=checkpoint,
    )  # fmt: skip
    artifact.save(work.base, model.cpu(), spec, threat=THREAT, provenance=found["settings"], store_dtype="float16")
    found |= {
        "history": [asdict(record) for record in result.history],
        "best_epoch": result.best_epoch,
        "note": result.note,
    }
    work.save("base", found, "done")


def _compile_pays(work: Work, deadline: float) -> bool:
    """Return whether compilation saves more than 30 seconds, according to the phase `speed`."""
    losses = work.result("speed").get("speed", {}).get("losses", {})
    seconds = losses.get("pgd_at", {}).get("seconds", {})
    if COMPILED not in seconds:
        return False
    gain = 1 - min(seconds[COMPILED]) / min(seconds["ours"])
    return gain * (deadline - time.monotonic()) > 30


def _seconds_an_epoch(model: nn.Module, images: ImageSet, settings: TrainSettings, device: str) -> float:
    """Return the seconds of an epoch, from a second epoch of a few steps on a copy, after compilation and warm-up."""
    few = stratified(images, TIMED_STEPS * settings.batch_size)
    timed = settings.model_copy(update={"epochs": 2, "validation_images": 0})
    result = train(copy.deepcopy(model), few, stratified(images, 0), THREAT, timed, device=device)
    return result.history[-1].seconds * len(images) / len(few)


@contextmanager
def _kept(work: Work, checkpoint: Path, spec: ModelSpec) -> Iterator[None]:
    """Store the best weights in half precision every minute, in case the machine becomes unavailable."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(KEEP_SECONDS):
            if checkpoint.exists():
                model = registry.build(spec)
                model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["best_weights"])
                artifact.save(work.partial, model, spec, threat=THREAT, store_dtype="float16")

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
