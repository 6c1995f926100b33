"""Clean and robust accuracy of a model: the attack, the bookkeeping that survives a kill, and the result card."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import ThreatModel, frozen_eval
from ..console import console, track
from ..data.base import ImageSet
from ..errors import UsageError
from ..models.layout import fastest_layout
from ..run_dir import digest
from .card import Accuracy, ResultCard
from .flags import BUFFERS_MOVED, behaviour_flags, mode_flags, twin_flags
from .hashing import buffers_hash, images_hash, models_hash
from .scoring import Precision, full_precision, score
from .state import EvalState, load_state
from .tiers import Tier, find_tier
from .worst_case import worst_points


class Twin(Protocol):
    """Another form of the same model, such as its ONNX file, that is scored on the very same images."""

    @property
    def key(self) -> str:
        """A hash of it: results stored for another twin are not reused."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Classes [N] (int64, on the CPU) of float32 images [N, C, H, W] in [0, 1]."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """A result card, and the twin's figures where there was one.

    Attributes:
        card: clean and robust accuracy of the model.
        twin_clean: accuracy of the twin without an attack.
        twin_robust: images that the twin gets right both as they are and at the worst point found on the model.
    """

    card: ResultCard
    twin_clean: Accuracy | None = None
    twin_robust: Accuracy | None = None


@dataclass(frozen=True)
class _Job:
    model: nn.Module
    images: ImageSet
    threat: ThreatModel
    name: str
    tier: Tier
    steps: int
    restarts: int
    batch_size: int
    seed: int
    device: torch.device
    precision: Precision
    twin: Twin | None
    state_path: Path | None
    layout: torch.memory_format

    @property
    def key(self) -> str:
        settings = [self.threat.to_json(), self.tier.name, self.steps, self.restarts, self.batch_size, self.seed]
        identity = [models_hash(self.model), images_hash(self.images), self.twin.key if self.twin else ""]
        return digest([settings, self.precision, identity])

    def save(self, state: EvalState) -> None:
        if self.state_path is not None:
            state.save(self.state_path)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.images.get(indices)
        return (x.to(self.device).float() / 255).contiguous(memory_format=self.layout), y.to(self.device)


def evaluate(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    model_name: str,
    data_name: str,
    split: str = "test",
    tier: str = "pgd",
    steps: int = 20,
    restarts: int = 2,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    state_path: Path | None = None,
    precision: Precision = "fp32",
) -> ResultCard:
    """Clean and robust accuracy of `model`; see `evaluate_with_twin`, of which this is the card."""
    return evaluate_with_twin(
        model, images, threat, model_name=model_name, data_name=data_name, split=split, tier=tier, steps=steps,
        restarts=restarts, batch_size=batch_size, seed=seed, device=device, state_path=state_path, precision=precision,
    ).card  # fmt: skip


def evaluate_with_twin(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    *,
    model_name: str,
    data_name: str,
    split: str = "test",
    tier: str = "pgd",
    steps: int = 20,
    restarts: int = 2,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    state_path: Path | None = None,
    precision: Precision = "fp32",
    twin: Twin | None = None,
) -> Evaluation:
    """Attacks every image that the model classifies rightly, and counts those that survive all restarts.

    An image counts as robust only if it is right as it is and at every point the attack tried (point-wise worst
    case). Successes are scored again in fp32 before they count, and every attacked image is proven to lie inside the
    threat model. Random starts depend on the seed, the batch and the restart alone, so that a run which was killed and
    resumed gives the counts of one that was not.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; float32. It leaves as it came.
        images: uint8 images and labels.
        threat: norm and radius; with epsilon 0 the robust accuracy is the clean one.
        model_name, data_name, split: for the card.
        tier: a name of `TIERS`.
        steps: gradient steps of each restart.
        restarts: random starts; each attacks only what survived those before.
        batch_size: images a batch.
        seed: of the random starts.
        device: where to run; the model comes back to where it was.
        state_path: file that keeps the progress; written after every batch.
        precision: of the attack's gradients. ``bf16`` is faster where the hardware has it.
        twin: the exported form of the model, scored on the clean images and on the worst points found.

    Raises:
        UsageError: unknown tier, no images, labels beyond the logits, weights that are not float32.
        QualityGateError: the attack returned a point outside the threat model.
    """
    chosen = find_tier(tier)
    _check_request(model, images, steps, restarts, batch_size)
    where = torch.device(device)
    flags = mode_flags(model)
    with frozen_eval(model), _moved(model, where), _kept_buffers(model):
        few, _ = images.get(torch.arange(min(2, len(images))))
        job = _Job(
            model=model, images=images, threat=threat, name=model_name, tier=chosen, steps=steps, restarts=restarts,
            batch_size=batch_size, seed=seed, device=where, precision=precision, twin=twin, state_path=state_path,
            layout=fastest_layout(model, few.to(where).float() / 255),
        )  # fmt: skip
        state = _begin(job)
        buffers = buffers_hash(model)
        state.counters.flags = _union(state.counters.flags, flags)
        if state.counters.clean_done == 0:
            state.counters.flags = _union(state.counters.flags, _first_look(job))
        _clean_pass(job, state)
        _attack_pass(job, state)
        if buffers_hash(model) != buffers:
            state.counters.flags = _union(state.counters.flags, [BUFFERS_MOVED])
    return _result(job, state, data_name, split)


def _check_request(model: nn.Module, images: ImageSet, steps: int, restarts: int, batch_size: int) -> None:
    if len(images) == 0:
        raise UsageError("there are no images to evaluate on. Check the data set and --limit.")
    for name, value in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    odd = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if odd:
        raise UsageError(f"evaluation needs float32 weights, found {', '.join(sorted(odd))}. Call model.float() first.")


@contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    first = next(model.parameters(), None)
    before = first.device if first is not None else device
    try:
        model.to(device)
        yield
    finally:
        model.to(before)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    copies = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in copies:
                buffer.copy_(copy)


def _begin(job: _Job) -> EvalState:
    if job.state_path is None:
        return EvalState.fresh("", len(job.images))
    state, note = load_state(job.state_path, job.key, len(job.images))
    if note:
        console.print(note, markup=False)
    return state


def _union(known: list[str], more: list[str]) -> list[str]:
    return list(dict.fromkeys([*known, *more]))


def _first_look(job: _Job) -> list[str]:
    x, y = job.get(torch.arange(min(64, len(job.images))))
    with torch.no_grad():
        logits = job.model(x)
    if logits.ndim != 2 or len(logits) != len(x):
        raise UsageError(f"the model must return logits [{len(x)}, K], it returned {tuple(logits.shape)}.")
    if int(y.max()) >= logits.shape[1]:
        raise UsageError(f"label {int(y.max())} found, but the model has {logits.shape[1]} outputs. Is the data right?")
    with full_precision():
        return behaviour_flags(job.model, x, y)


def _clean_pass(job: _Job, state: EvalState) -> None:
    total = len(job.images)
    counters = state.counters
    with track(f"{job.name}: clean accuracy", total, counters.clean_done) as advance:
        for start in range(counters.clean_done, total, job.batch_size):
            begin = time.monotonic()
            stop = min(start + job.batch_size, total)
            x, y = job.get(torch.arange(start, stop))
            predicted, _ = score(job.model, x, y)
            state.clean[start:stop] = (predicted == y).cpu().numpy()
            if job.twin is not None:
                twin = job.twin.predict(x.cpu())
                state.twin_clean[start:stop] = (twin == y.cpu()).numpy()
                counters.twin_mismatch += int((twin != predicted.cpu()).sum())
            counters.clean_done = stop
            counters.seconds += time.monotonic() - begin
            job.save(state)
            advance(stop - start, f"clean {state.clean[:stop].mean():.1%}")


def _attack_pass(job: _Job, state: EvalState) -> None:
    active = torch.from_numpy(np.flatnonzero(state.clean))
    if job.threat.epsilon == 0:
        state.robust[:] = state.clean
        state.twin_robust[:] = state.twin_clean
        return
    counters = state.counters
    label = f"{job.name}: PGD-{job.steps}, {job.restarts} restart{'s' if job.restarts != 1 else ''}"
    with track(label, len(active), counters.attacked) as advance:
        for start in range(counters.attacked, len(active), job.batch_size):
            begin = time.monotonic()
            indices = active[start : start + job.batch_size]
            _attack_batch(job, state, indices, start)
            counters.attacked = start + len(indices)
            counters.seconds += time.monotonic() - begin
            job.save(state)
            # Images wrong without an attack are wrong under it: the rate so far is over their share as well.
            so_far = state.robust.sum() / counters.attacked * state.clean.mean()
            advance(len(indices), f"robust about {so_far:.1%}")


def _attack_batch(job: _Job, state: EvalState, indices: Tensor, start: int) -> None:
    x, y = job.get(indices)
    right, worst, counted = worst_points(
        job.model, x, y, job.threat, steps=job.steps, restarts=job.restarts, seed=job.seed, batch=start,
        precision=job.precision,
    )  # fmt: skip
    state.robust[indices.numpy()] = right.cpu().numpy()
    state.counters.forwards += counted.forwards
    state.counters.backwards += counted.backwards
    if job.twin is not None:
        survives = (job.twin.predict(worst.cpu()) == y.cpu()).numpy()
        state.twin_robust[indices.numpy()] = survives & state.twin_clean[indices.numpy()]


def _result(job: _Job, state: EvalState, data_name: str, split: str) -> Evaluation:
    total, counters = len(job.images), state.counters
    flags = list(counters.flags)
    clean, robust = Accuracy(int(state.clean.sum()), total), Accuracy(int(state.robust.sum()), total)
    twin_clean = twin_robust = None
    if job.twin is not None:
        twin_clean = Accuracy(int(state.twin_clean.sum()), total)
        twin_robust = Accuracy(int(state.twin_robust.sum()), total)
        flags += twin_flags(counters.twin_mismatch, total, robust.correct, twin_robust.correct)
    attack = job.tier.attack_line(job.steps, job.restarts)
    if job.threat.epsilon == 0:
        attack = "none: epsilon is 0"
    elif job.precision == "bf16":
        attack += ", bf16 gradients"
    card = ResultCard(
        model=job.name, data=data_name, split=split, tier=job.tier.name, attack=attack, threat=job.threat.to_json(),
        clean=clean, robust=robust, flags=tuple(flags), forwards=counters.forwards, backwards=counters.backwards,
        seconds=counters.seconds, seed=job.seed,
    )  # fmt: skip
    return Evaluation(card, twin_clean, twin_robust)
