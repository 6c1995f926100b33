"""Clean and robust accuracy of a model, by resumable attacks, as a result card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..attacks import ThreatModel, frozen_eval, kept_buffers
from ..attacks.projections import random_start
from ..console import console, working
from ..data.base import ImageSet, as_floats, images_at_once, labels_of
from ..errors import UsageError
from ..introspect.copies import copied
from ..introspect.fingerprint import buffers_hash, images_hash, models_hash
from ..models.layout import fastest_layout, runs_in_bf16, tf32
from ..recipe import EvaluationSection
from .card import Accuracy, ClassAccuracy, ExportedAccuracy, ResultCard
from .files import ExportedModel, differs
from .flags import (
    BUFFERS_MOVED,
    CHECK_IMAGES,
    NOT_COPIED,
    behaviour_flags,
    black_box_flags,
    exported_flags,
    gap_flags,
    learned_flags,
    mode_flags,
    sweep_flags,
    usual_scale,
)
from .passes import BLACK_BOX, Request, attack_pass, black_box_pass, check_labels, clean_pass, sweep_pass
from .scoring import Precision
from .stages import attack_line, stages_of
from .state import EvalState, load_state, stored_key
from .witness import Witness, witness_flags

DEFAULT_BATCH = 250


@dataclass(frozen=True)
class Subject:
    """Names on the result card.

    Attributes:
        model: name of the model.
        data, split: data set and split of the images.
    """

    model: str = "model"
    data: str = "data"
    split: str = "test"


# More than eight parameters: four say what is evaluated and how; the others, by keyword, only complete the record.
def evaluate(
    model: nn.Module,
    images: ImageSet,
    threat: ThreatModel,
    section: EvaluationSection | None = None,
    *,
    subject: Subject | None = None,
    seed: int = 0,
    exported: Mapping[str, ExportedModel] | None = None,
    state_path: Path | None = None,
    shared: bool = False,
) -> ResultCard:
    """Attack every image that the model classifies correctly, and count those that survive all attacks of the tier.

    An image counts as robust only if it is classified correctly without an attack and at every point that the attacks
    return (point-wise worst case). In tiers above ``pgd`` a black-box attack then tries up to 64 survivors. Successes
    are scored again in fp32, and every adversarial image is checked to lie in the threat model. Random starts depend
    only on the seed, the attack and the batch, so that a resumed run gives the same counts as an uninterrupted one.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; its weights are float32. It is attacked on the device
            of its parameters; modes, flags and buffers are restored.
        images: uint8 images and labels, all of which are used.
        threat: norm and radius; with epsilon 0 robust accuracy equals clean accuracy.
        section: tier, steps and restarts of PGD (each restart attacks only the survivors of the previous ones), other
            radii, batch size and precision of the gradients; the ensemble of the ``standard`` tier always runs in fp32.
        subject: names on the card.
        seed: random seed of the attacks.
        exported: exported forms of the model by name; they are scored on the clean images and on the worst points.
        state_path: file for the progress, written after every batch, from which an interrupted run is resumed.
        shared: whether all processes of a distributed run call this function and attack their shares of every batch.
            Only the first process has the full result. Random starts then also depend on the number of processes.

    Returns:
        The result card.

    Raises:
        UsageError: the tier is unknown or needs more classes, there are no images, a label exceeds the number of
            logits, the weights are not float32, or the outputs have no gradient with respect to the images.
        QualityGateError: an attack returned a point outside the threat model.
    """
    section, subject = section or EvaluationSection(), subject or Subject()
    _check_request(model, images)
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    flags = mode_flags(model)
    with frozen_eval(model), kept_buffers(model):
        few, _ = images.get(torch.arange(min(2, len(images))))
        few = as_floats(few, device)
        request = Request(
            model=model, images=images, threat=threat, name=subject.model, section=section,
            batch_size=section.batch_size or images_at_once(images, DEFAULT_BATCH),
            seed=seed, device=device, precision=_precision(section, model, few), exported=exported or {},
            state_path=state_path, layout=fastest_layout(model, few), shared=shared and distributed.count() > 1,
        )  # fmt: skip
        state = _begin(request) if request.leads else EvalState.fresh("", len(images))
        buffers = buffers_hash(model)
        state.counters.flags = _union(state.counters.flags, flags)
        untouched = None if state.counters.checked_again else _copy(model)
        if state.counters.clean_done == 0:
            _first_look(request, state, few)
        if request.leads:
            clean_pass(request, state)
        if request.shared:
            state = distributed.broadcast(state)
        witness = attack_pass(request, state)
        if request.leads:
            black_box_pass(request, state)
            sweep_pass(request, state)
        if buffers_hash(model) != buffers:
            state.counters.flags = _union(state.counters.flags, [BUFFERS_MOVED])
        elif request.leads and not state.counters.checked_again:
            _last_look(request, state, untouched, witness)
    return _result(request, state, subject)


def _precision(section: EvaluationSection, model: nn.Module, few: Tensor) -> Precision:
    if section.precision == "auto":
        return "bf16" if runs_in_bf16(model, few) else "fp32"
    return section.precision


def _check_request(model: nn.Module, images: ImageSet) -> None:
    if len(images) == 0:
        raise UsageError("there are no images to evaluate on. Check the data set and --images.")
    odd = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if odd:
        raise UsageError(f"evaluation needs float32 weights, found {', '.join(sorted(odd))}. Call model.float() first.")


def _begin(request: Request) -> EvalState:
    if request.state_path is None:
        return EvalState.fresh("", len(request.images), len(request.exported))
    path, key, sizes = request.state_path, request.key, (len(request.images), len(request.exported))
    state, note = load_state(path, key, *sizes)
    if note:
        # A mistyped option would otherwise discard hours of a strong attack.
        kept = _put_aside(path, stored_key(path))
        path.replace(kept)
        console.print(f"{note} It is kept as {kept.name}.", markup=False)
    aside = _put_aside(path, key)
    if path.exists() or not aside.exists():
        return state
    state, note = load_state(aside, key, *sizes)
    if not note:
        aside.replace(path)
        console.print(f"{aside.name} fits: the evaluation goes on from it.", markup=False)
    return state


def _put_aside(path: Path, key: str) -> Path:
    """Return where the progress of an evaluation with this key is kept while another one uses its file."""
    return path.with_name(f"{path.name}.{key[:8] or 'damaged'}.old")


def _union(known: list[str], more: list[str]) -> list[str]:
    return list(dict.fromkeys([*known, *more]))


@torch.no_grad()
def _classes(request: Request, few: Tensor) -> int:
    logits = request.model(few)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(few):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the model must return logits [{len(few)}, K], it returned {found}.")
    stages_of(request.section.tier, logits.shape[1])
    return int(logits.shape[1])


def _first_look(request: Request, state: EvalState, few: Tensor) -> None:
    """Note the number of classes, the scale of the logits, which files compute something else, and first warnings."""
    counters = state.counters
    counters.classes = _classes(request, few)
    x, y = _few_images(request)
    check_labels(y, counters.classes)
    with working(f"{request.name}: checks of its answers and gradients"), tf32(False):
        counters.flags = _union(counters.flags, behaviour_flags(request.model, x, y))
        with torch.no_grad():
            logits = request.model(x).float()
        counters.scale = usual_scale(logits)
        counters.exported_differs = [differs(logits, file.logits(x.cpu())) for file in request.exported.values()]


def _copy(model: nn.Module) -> nn.Module | None:
    """Return a copy of the model, or None if it holds something that cannot be copied."""
    try:
        return copied(model)
    except UsageError:
        return None


def _last_look(request: Request, state: EvalState, untouched: nn.Module | None, witness: Witness) -> None:
    """Check what a model could have hidden at first: that it remembers its questions, and what it told the attacks.

    Args:
        request: the request.
        state: the state, whose warnings are completed.
        untouched: copy of the model from before the attacks, None if it cannot be copied.
        witness: what noted the gradients of the attacks.
    """
    x, _ = _few_images(request)
    with working(f"{request.name}: the same checks after the attacks"), tf32(False):
        start = random_start(x, request.threat, torch.Generator().manual_seed(request.seed))
        found = [NOT_COPIED] if untouched is None else learned_flags(request.model, untouched, torch.cat([x, start]))
        if (noted := witness.noted()) is not None:
            found += witness_flags(request.attacked(state), noted, request.device, request.threat.norm)
    state.counters.flags = _union(state.counters.flags, found)
    state.counters.checked_again = True
    request.save(state)


def _few_images(request: Request) -> tuple[Tensor, Tensor]:
    return request.get(request.spread(min(CHECK_IMAGES, request.batch_size)))


def _result(request: Request, state: EvalState, subject: Subject) -> ResultCard:
    total, counters = len(request.images), state.counters
    clean, robust = Accuracy.of(state.clean), Accuracy.of(state.robust)
    breakdown = _breakdown(request, state)
    sweep = {
        float(radius): Accuracy(counts[0], counts[1]) for radius, counts in sorted(counters.sweep.items(), key=_radius)
    }
    flags = [*counters.flags, *sweep_flags({radius: accuracy.value for radius, accuracy in sweep.items()})]
    if "pgd" in breakdown:
        flags += gap_flags(breakdown["pgd"], robust.correct, total)
    if counters.black_box is not None:
        flags += black_box_flags("the model", *counters.black_box)
    exported = {}
    for index, name in enumerate(request.exported):
        found = state.exported_clean[index], state.exported_robust[index]
        exported[name] = ExportedAccuracy(*map(Accuracy.of, found))
        flags += exported_flags(
            name, counters.exported_mismatch[index], total, robust.correct, exported[name].robust.correct,
            same=not counters.exported_differs[index],
        )  # fmt: skip
        if name in counters.exported_black_box and not counters.exported_differs[index]:
            flags += black_box_flags(f"the {name} file's torch model", *counters.exported_black_box[name])
    stages = stages_of(request.section.tier, counters.classes)
    section = request.section
    attack = attack_line(stages, section.steps, section.restarts, counters.classes, request.precision)
    if request.threat.epsilon == 0:
        attack = "none: epsilon is 0"
    return ResultCard(
        model=subject.model, data=subject.data, split=subject.split, tier=request.section.tier, attack=attack,
        threat=request.threat, clean=clean, robust=robust, flags=tuple(dict.fromkeys(flags)),
        forwards=counters.forwards, backwards=counters.backwards, seconds=counters.seconds, seed=request.seed,
        breakdown=breakdown, per_class=_per_class(request, state), sweep=tuple(sweep.items()),
        model_hash=models_hash(request.model), images_hash=images_hash(request.images), exported=exported,
    )  # fmt: skip


def _radius(item: tuple[str, list[int]]) -> float:
    return float(item[0])


def _breakdown(request: Request, state: EvalState) -> dict[str, int]:
    """Return the number of images classified correctly after each attack; stages of the same name are merged."""
    found = {}
    names = [stage.name for stage in request.stages(state)]
    if state.counters.black_box is not None:
        names.append(BLACK_BOX)
    for index, name in enumerate(names):
        found[name] = int((state.clean & ((state.fell < 0) | (state.fell > index))).sum())
    return found


def _per_class(request: Request, state: EvalState) -> tuple[ClassAccuracy, ...]:
    labels = labels_of(request.images).numpy()
    return tuple(
        ClassAccuracy(
            int(label),
            int((labels == label).sum()),
            int(state.clean[labels == label].sum()),
            int(state.robust[labels == label].sum()),
        )
        for label in np.unique(labels)
    )
