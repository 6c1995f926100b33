"""Clean and robust accuracy of a model: the attacks, the bookkeeping that survives a kill, and the result card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..attacks import ThreatModel, frozen_eval, kept_buffers
from ..console import console
from ..data.base import ImageSet, images_at_once
from ..errors import UsageError
from ..models.layout import fastest_layout, tf32
from .card import Accuracy, ClassAccuracy, ResultCard
from .flags import (
    BUFFERS_MOVED,
    CHECK_IMAGES,
    behaviour_flags,
    black_box_flags,
    gap_flags,
    mode_flags,
    sweep_flags,
    twin_flags,
)
from .hashing import buffers_hash, images_hash, models_hash
from .passes import BLACK_BOX, Job, Twin, attack_pass, black_box_pass, check_labels, clean_pass, sweep_pass
from .scoring import Precision
from .standard import check_classes
from .state import EvalState, load_state
from .tiers import find_tier

DEFAULT_BATCH = 250


@dataclass(frozen=True)
class TwinAccuracy:
    """What a twin gets right.

    Attributes:
        clean: images without an attack.
        robust: images that the model gets right as they are, and the twin as they are, at the worst points found on
            the model, and after the black-box check on the twin itself.
    """

    clean: Accuracy
    robust: Accuracy


@dataclass(frozen=True)
class Evaluation:
    """A result card, and the figures of the twins by name."""

    card: ResultCard
    twins: dict[str, TwinAccuracy] = field(default_factory=dict)


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
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    state_path: Path | None = None,
    precision: Precision = "fp32",
    sweep: Sequence[float] = (),
) -> ResultCard:
    """Clean and robust accuracy of `model`; see `evaluate_with_twins`, of which this is the card."""
    return evaluate_with_twins(
        model, images, threat, model_name=model_name, data_name=data_name, split=split, tier=tier, steps=steps,
        restarts=restarts, batch_size=batch_size, seed=seed, device=device, state_path=state_path, precision=precision,
        sweep=sweep,
    ).card  # fmt: skip


def evaluate_with_twins(
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
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    state_path: Path | None = None,
    precision: Precision = "fp32",
    sweep: Sequence[float] = (),
    twins: Mapping[str, Twin] | None = None,
    together: bool = False,
) -> Evaluation:
    """Attacks every image that the model classifies rightly, and counts those that survive all attacks of the tier.

    An image counts as robust only if it is right as it is and at every point the attacks returned (point-wise worst
    case). In the tiers above ``pgd`` a black-box attack then tries a few survivors. Successes are scored again in fp32
    before they count, and every attacked image is proven to lie inside the threat model. Random starts depend on the
    seed, the attack and the batch alone, so that a run which was killed and resumed gives the counts of one that was
    not.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; float32. It leaves as it came.
        images: uint8 images and labels.
        threat: norm and radius; with epsilon 0 the robust accuracy is the clean one.
        model_name, data_name, split: for the card.
        tier: a name of `TIERS`.
        steps: gradient steps of PGD.
        restarts: random starts of PGD; each attacks only what survived those before.
        batch_size: images a batch; 250 by default, fewer where they are large (see `images_at_once`).
        seed: of the random starts.
        device: where to run; the model comes back to where it was.
        state_path: file that keeps the progress; written after every batch.
        precision: of the attacks' gradients. ``bf16`` is faster where the hardware has it. The ensemble of the
            ``standard`` tier stays in fp32.
        sweep: other radii to measure, by PGD with one start on the first images.
        twins: exported forms of the model by name, scored on the clean images and on the worst points found.
        together: all processes of a distributed run call this, and each attacks its share of every batch. The first
            one has the result. Random starts then depend on the number of processes too.

    Raises:
        UsageError: unknown tier or one that so few classes do not allow, no images, labels beyond the logits, weights
            that are not float32.
        QualityGateError: the attack returned a point outside the threat model.
    """
    chosen = find_tier(tier)
    _check_request(model, images, steps, restarts, batch_size, sweep)
    where = torch.device(device)
    flags = mode_flags(model)
    with frozen_eval(model), _moved(model, where), kept_buffers(model):
        few, _ = images.get(torch.arange(min(2, len(images))))
        few = few.to(where).float() / 255
        job = Job(
            model=model, images=images, threat=threat, name=model_name, tier=chosen,
            steps=steps, restarts=restarts, sweep=tuple(sweep),
            batch_size=batch_size or images_at_once(images, DEFAULT_BATCH), seed=seed, device=where,
            precision=precision, twins=twins or {}, state_path=state_path, layout=fastest_layout(model, few),
            together=together and distributed.count() > 1,
        )  # fmt: skip
        state = _begin(job) if job.leads else EvalState.fresh("", len(images))
        buffers = buffers_hash(model)
        state.counters.flags = _union(state.counters.flags, flags)
        if state.counters.clean_done == 0:
            state.counters.classes = _classes(job, few)
            state.counters.flags = _union(state.counters.flags, _first_look(job, state.counters.classes))
        if job.leads:
            clean_pass(job, state)
        if job.together:
            state = distributed.from_first(state)
        attack_pass(job, state)
        if job.leads:
            black_box_pass(job, state)
            sweep_pass(job, state)
        if buffers_hash(model) != buffers:
            state.counters.flags = _union(state.counters.flags, [BUFFERS_MOVED])
    return _result(job, state, data_name, split)


def _check_request(
    model: nn.Module, images: ImageSet, steps: int, restarts: int, batch_size: int | None, sweep: Sequence[float]
) -> None:
    if len(images) == 0:
        raise UsageError("there are no images to evaluate on. Check the data set and --limit.")
    for name, value in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    for radius in sweep:
        ThreatModel("linf", radius)
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


def _begin(job: Job) -> EvalState:
    if job.state_path is None:
        return EvalState.fresh("", len(job.images), len(job.twins))
    state, note = load_state(job.state_path, job.key, len(job.images), len(job.twins))
    if note:
        # Hours of a strong attack may lie in it, and a mistyped option be all that keeps them from going on.
        kept = job.state_path.with_name(f"{job.state_path.name}.old")
        job.state_path.replace(kept)
        console.print(f"{note} It is kept as {kept.name}.", markup=False)
    return state


def _union(known: list[str], more: list[str]) -> list[str]:
    return list(dict.fromkeys([*known, *more]))


@torch.no_grad()
def _classes(job: Job, few: Tensor) -> int:
    logits = job.model(few)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(few):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the model must return logits [{len(few)}, K], it returned {found}.")
    if job.tier.name == "standard":
        check_classes(logits.shape[1])
    return int(logits.shape[1])


def _first_look(job: Job, classes: int) -> list[str]:
    x, y = job.get(torch.arange(min(CHECK_IMAGES, job.batch_size, len(job.images))))
    check_labels(y, classes)
    with tf32(False):
        return behaviour_flags(job.model, x, y)


def _result(job: Job, state: EvalState, data_name: str, split: str) -> Evaluation:
    total, counters = len(job.images), state.counters
    clean, robust = Accuracy(int(state.clean.sum()), total), Accuracy(int(state.robust.sum()), total)
    breakdown = _breakdown(job, state)
    sweep = {float(radius): Accuracy(*counts) for radius, counts in sorted(counters.sweep.items(), key=_radius)}
    flags = [*counters.flags, *sweep_flags({radius: accuracy.value for radius, accuracy in sweep.items()})]
    if "pgd" in breakdown:
        flags += gap_flags(breakdown["pgd"], robust.correct, total)
    if counters.black_box is not None:
        flags += black_box_flags("the model", *counters.black_box)
    twins = {}
    for index, name in enumerate(job.twins):
        right = (Accuracy(int(found[index].sum()), total) for found in (state.twin_clean, state.twin_robust))
        twins[name] = TwinAccuracy(*right)
        flags += twin_flags(name, counters.twin_mismatch[index], total, robust.correct, twins[name].robust.correct)
        if counters.twin_black_box:
            flags += black_box_flags(f"the {name} file's torch model", *counters.twin_black_box[index])
    attack = job.tier.attack_line(counters.classes, job.steps, job.restarts)
    if job.threat.epsilon == 0:
        attack = "none: epsilon is 0"
    elif job.precision == "bf16" and job.tier.name != "standard":
        attack += ", bf16 gradients"
    card = ResultCard(
        model=job.name, data=data_name, split=split, tier=job.tier.name, attack=attack, threat=job.threat.to_json(),
        clean=clean, robust=robust, flags=tuple(dict.fromkeys(flags)), forwards=counters.forwards,
        backwards=counters.backwards, seconds=counters.seconds, seed=job.seed, breakdown=breakdown,
        per_class=_per_class(job, state), sweep=tuple(sweep.items()), model_hash=models_hash(job.model),
        images_hash=images_hash(job.images),
    )  # fmt: skip
    return Evaluation(card, twins)


def _radius(item: tuple[str, list[int]]) -> float:
    return float(item[0])


def _breakdown(job: Job, state: EvalState) -> dict[str, int]:
    """Images still right after each attack; stages of one name count together."""
    found = {}
    names = [stage.name for stage in job.stages(state)]
    if state.counters.black_box is not None:
        names.append(BLACK_BOX)
    for index, name in enumerate(names):
        found[name] = int((state.clean & ((state.fell < 0) | (state.fell > index))).sum())
    return found


def _per_class(job: Job, state: EvalState) -> tuple[ClassAccuracy, ...]:
    parts = torch.arange(len(job.images)).split(job.batch_size)
    labels = np.concatenate([job.images.get(part)[1].cpu().numpy() for part in parts])
    return tuple(
        ClassAccuracy(
            int(label),
            int((labels == label).sum()),
            int(state.clean[labels == label].sum()),
            int(state.robust[labels == label].sum()),
        )
        for label in np.unique(labels)
    )
