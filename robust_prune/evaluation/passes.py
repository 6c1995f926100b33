"""The passes of an evaluation over its images. Each goes on from the state it is given, and saves it as it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..attacks import ThreatModel, square
from ..attacks.objectives import misclassified
from ..attacks.square import Predict
from ..console import track
from ..data.base import ImageSet
from ..run_dir import digest
from .flags import CHECK_IMAGES
from .hashing import images_hash, models_hash
from .scoring import CountedModel, Precision, check_points, full_precision, score
from .state import EvalState, Flags
from .tiers import Stage, Tier
from .worst_case import Attacker, start_seed, worst_points

BLACK_BOX_QUERIES = 500
SWEEP_IMAGES = 256
BLACK_BOX = "square"
"""What the breakdown calls what the black-box check broke after all stages; the ensemble's own Square is a stage."""


class Twin(Protocol):
    """Another form of the same model, such as its ONNX file, that is scored on the very same images."""

    @property
    def key(self) -> str:
        """A hash of it: results stored for another twin are not reused."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """Logits [N, K] (float32, on the CPU) of float32 images [N, C, H, W] in [0, 1]."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Classes [N] (int64, on the CPU) of the same; -1 where a logit is not finite."""
        ...


@dataclass(frozen=True)
class Job:
    """Everything that an evaluation is asked for."""

    model: nn.Module
    images: ImageSet
    threat: ThreatModel
    name: str
    tier: Tier
    steps: int
    restarts: int
    sweep: tuple[float, ...]
    batch_size: int
    seed: int
    device: torch.device
    precision: Precision
    twin: Twin | None
    state_path: Path | None
    layout: torch.memory_format

    @property
    def key(self) -> str:
        """Hash of what the outcome depends on."""
        settings = [self.threat.to_json(), self.tier.name, self.steps, self.restarts, self.sweep, self.batch_size]
        identity = [models_hash(self.model), images_hash(self.images), self.twin.key if self.twin else ""]
        return digest([settings, self.seed, self.precision, identity])

    def stages(self, state: EvalState) -> tuple[Stage, ...]:
        """The attacks in order; none where nothing may be perturbed."""
        return self.tier.stages(state.counters.classes) if self.threat.epsilon else ()

    def save(self, state: EvalState) -> None:
        """Writes the state, if it has a place."""
        if self.state_path is not None:
            state.save(self.state_path)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels, on the device."""
        x, y = self.images.get(indices)
        return (x.to(self.device).float() / 255).contiguous(memory_format=self.layout), y.to(self.device)


@contextmanager
def _timed(job: Job, state: EvalState) -> Iterator[None]:
    """Adds the time of a batch to the state and saves it, unless the batch failed."""
    begin = time.monotonic()
    yield
    state.counters.seconds += time.monotonic() - begin
    job.save(state)


def clean_pass(job: Job, state: EvalState) -> None:
    """Predictions without an attack."""
    total = len(job.images)
    counters = state.counters
    with track(f"{job.name}: clean accuracy", total, counters.clean_done) as advance:
        for start in range(counters.clean_done, total, job.batch_size):
            stop = min(start + job.batch_size, total)
            with _timed(job, state):
                x, y = job.get(torch.arange(start, stop))
                predicted, _ = score(job.model, x, y)
                state.clean[start:stop] = (predicted == y).cpu().numpy()
                state.robust[start:stop] = state.clean[start:stop]
                if job.twin is not None:
                    twin = job.twin.predict(x.cpu())
                    state.twin_clean[start:stop] = (twin == y.cpu()).numpy()
                    state.twin_robust[start:stop] = state.twin_clean[start:stop] & state.clean[start:stop]
                    counters.twin_mismatch += int((twin != predicted.cpu()).sum())
                counters.clean_done = stop
            advance(stop - start, f"clean {state.clean[:stop].mean():.1%}")


def attack_pass(job: Job, state: EvalState) -> None:
    """The tier's stages, each on what survived those before."""
    counters = state.counters
    stages = job.stages(state)
    attacker = Attacker(job.model, job.threat, counters.classes, job.steps, job.restarts, job.seed, job.precision)
    for index in range(counters.stage, len(stages)):
        stage = stages[index]
        # As they stood when the stage began, also when it is gone on with.
        standing = state.clean & ((state.fell < 0) | (state.fell >= index))
        active = torch.from_numpy(np.flatnonzero(standing))
        with track(f"{job.name}: {_title(job, stage, stages)}", len(active), counters.attacked) as advance:
            for start in range(counters.attacked, len(active), job.batch_size):
                indices = active[start : start + job.batch_size]
                with _timed(job, state):
                    _attack_batch(job, state, attacker, stage, index, indices, start)
                    counters.attacked = start + len(indices)
                # Only the images attacked so far are known; the others are taken to fall as often.
                so_far = state.robust[active[: counters.attacked]].mean() * standing.mean()
                advance(len(indices), f"robust about {so_far:.1%}")
        counters.stage, counters.attacked = index + 1, 0


def _title(job: Job, stage: Stage, stages: tuple[Stage, ...]) -> str:
    if stage.kind == "pgd":
        return f"PGD-{job.steps}, {job.restarts} restart{'s' if job.restarts != 1 else ''}"
    aimed = f", target {stage.rank} of {sum(s.kind == 'apgd-t' for s in stages)}" if stage.rank else ""
    return f"{stage.name.upper()}{aimed}"


def _attack_batch(
    job: Job, state: EvalState, attacker: Attacker, stage: Stage, index: int, indices: Tensor, start: int
) -> None:
    x, y = job.get(indices)
    right, worst, counted = attacker.run(stage, x, y, start)
    rows = indices.numpy()
    survives = right.cpu().numpy()
    state.robust[rows] = survives
    state.fell[rows[~survives]] = index
    state.counters.forwards += counted.forwards
    state.counters.backwards += counted.backwards
    if job.twin is not None:
        state.twin_robust[rows] &= (job.twin.predict(worst.cpu()) == y.cpu()).numpy()


def black_box_pass(job: Job, state: EvalState) -> None:
    """Square on a few survivors, of the model and of its twin directly: what it breaks, the gradients had hidden."""
    if not (job.tier.black_box and job.threat.epsilon):
        return
    counters = state.counters
    if counters.black_box is None:
        counted = CountedModel(job.model)

        def exact(images: Tensor) -> Tensor:
            with full_precision():
                logits: Tensor = counted(images)
                return logits

        with _timed(job, state):
            checked, broken = _black_box(job, state.robust, exact, f"{job.name}: Square on survivors")
            state.robust[broken] = False
            state.fell[broken] = len(job.stages(state))
            counters.forwards += counted.forwards
            counters.black_box = [checked, len(broken)]
    if job.twin is not None and counters.twin_black_box is None:
        with _timed(job, state):
            checked, broken = _black_box(job, state.twin_robust, job.twin.logits, f"{job.name}: Square on its file")
            state.twin_robust[broken] = False
            counters.twin_black_box = [checked, len(broken)]


def _black_box(job: Job, survivors: Flags, predict: Predict, label: str) -> tuple[int, NDArray[np.int64]]:
    """How many survivors were tried, and the positions of those that fell."""
    rows = np.flatnonzero(survivors)[:CHECK_IMAGES]
    if len(rows) == 0:
        return 0, rows
    x, y = job.get(torch.from_numpy(rows))
    with track(label, BLACK_BOX_QUERIES) as advance:

        def shown(images: Tensor) -> Tensor:
            advance()
            return predict(images)

        generator = torch.Generator().manual_seed(start_seed(job.seed, 0, BLACK_BOX))
        points = square(shown, x, y, job.threat, queries=BLACK_BOX_QUERIES, generator=generator)
    check_points(points, x, job.threat)
    with torch.no_grad():
        wrong = misclassified(predict(points).to(y.device), y).cpu().numpy()
    return len(rows), rows[wrong]


def sweep_pass(job: Job, state: EvalState) -> None:
    """Robust accuracy of the first images at other radii, by PGD with one start."""
    counters = state.counters
    count = min(SWEEP_IMAGES, len(job.images))
    active = torch.from_numpy(np.flatnonzero(state.clean[:count]))
    todo = [radius for radius in job.sweep if f"{radius:.9g}" not in counters.sweep]
    with track(f"{job.name}: other radii", len(todo)) as advance:
        for radius in todo:
            threat = ThreatModel(job.threat.norm, radius)
            with _timed(job, state):
                right = 0
                for start in range(0, len(active), job.batch_size):
                    x, y = job.get(active[start : start + job.batch_size])
                    survives, _, counted = worst_points(
                        job.model, x, y, threat, steps=job.steps, restarts=1, seed=job.seed, batch=start,
                        precision=job.precision,
                    )  # fmt: skip
                    right += int(survives.sum())
                    counters.forwards += counted.forwards
                    counters.backwards += counted.backwards
                counters.sweep[f"{radius:.9g}"] = [right, count]
            advance()
