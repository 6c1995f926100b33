"""Passes of an evaluation over its images; each resumes from a state and saves it after every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import distributed
from ..attacks import ThreatModel, square
from ..attacks.objectives import misclassified
from ..attacks.square import Predict
from ..console import track
from ..data.base import ImageSet, as_floats, labels_of, stratified_order
from ..errors import UsageError
from ..introspect.fingerprint import images_hash, models_hash
from ..models import user_file
from ..models.layout import tf32
from ..recipe import EvaluationSection
from ..runs.files import digest
from ..serialization import to_json
from . import worst_case
from .files import ExportedModel, FileVerdicts
from .flags import CHECK_IMAGES
from .scoring import CountedModel, Precision, Rescaled, check_points, score
from .stages import PGD, Stage, stages_of
from .state import EvalState, Flags
from .witness import Witness
from .worst_case import Attacker, start_seed, worst_points

BLACK_BOX_QUERIES = 500
SWEEP_IMAGES = 256
BLACK_BOX = "square"
"""Name of the black-box check after all stages in the breakdown; the ensemble's own Square is a stage."""


@dataclass(frozen=True)
class Request:
    """Parameters of an evaluation; see `evaluate` for those not listed.

    Attributes:
        name: name of the model in progress messages.
        batch_size: images in each batch.
        device: device of the model.
        precision: precision of the attacks' gradients.
        layout: memory format of the images.
        shared: whether processes share every batch.
    """

    model: nn.Module
    images: ImageSet
    threat: ThreatModel
    name: str
    section: EvaluationSection
    batch_size: int
    seed: int
    device: torch.device
    precision: Precision
    exported: Mapping[str, ExportedModel]
    state_path: Path | None
    layout: torch.memory_format
    shared: bool = False

    @property
    def leads(self) -> bool:
        """Whether this process runs the work that is not divided among processes."""
        return distributed.is_first() or not self.shared

    @property
    def key(self) -> str:
        """Hash of everything on which the results depend."""
        section = self.section
        settings = [
            to_json(self.threat), section.tier, user_file.versions(section.tier), section.steps, section.restarts,
            section.sweep, self.batch_size, [objective.__name__ for objective in worst_case.PGD_OBJECTIVES],
        ]  # fmt: skip
        exported = {name: file.key for name, file in self.exported.items()}
        identity = [models_hash(self.model), images_hash(self.images), exported]
        return digest([settings, self.seed, self.precision, identity])

    def stages(self, state: EvalState) -> tuple[Stage, ...]:
        """Return the attacks in order; none if epsilon is 0."""
        return stages_of(self.section.tier, state.counters.classes) if self.threat.epsilon else ()

    def attacked(self, state: EvalState) -> nn.Module:
        """Return the model as attacks see it: with logits on a usual scale."""
        return self.model if state.counters.scale == 1 else Rescaled(self.model, state.counters.scale)

    def save(self, state: EvalState) -> None:
        """Write the state to `state_path`, if it is set."""
        if self.state_path is not None:
            state.save(self.state_path)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1] and labels [N] on the device."""
        x, y = self.images.get(indices)
        return as_floats(x, self.device).contiguous(memory_format=self.layout), y.to(self.device)

    def spread(self, count: int, among: Tensor | None = None) -> Tensor:
        """Return up to `count` positions of the images, or of those at `among` (int64 [N]), in stratified order."""
        labels = labels_of(self.images)
        among = torch.arange(len(labels)) if among is None else among
        return among[stratified_order(labels[among])[:count]]


@contextmanager
def _timed(request: Request, state: EvalState) -> Iterator[None]:
    """Add the wall time of a batch to the state and save the state, unless the batch failed."""
    begin = time.monotonic()
    yield
    state.counters.seconds += time.monotonic() - begin
    request.save(state)


def check_labels(y: Tensor, classes: int) -> None:
    """Raise UsageError unless all labels are in 0..`classes` - 1."""
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise UsageError(f"label {wrong} found, but the model has {classes} outputs. Is the data right?")


def clean_pass(request: Request, state: EvalState) -> None:
    """Classify the images that `state` lacks, without an attack, with the model and its exported forms."""
    total = len(request.images)
    counters = state.counters
    with track(f"{request.name}: clean accuracy", total, counters.clean_done) as advance:
        for start in range(counters.clean_done, total, request.batch_size):
            stop = min(start + request.batch_size, total)
            with _timed(request, state):
                x, y = request.get(torch.arange(start, stop))
                check_labels(y, counters.classes)
                predicted, _ = score(request.model, x, y)
                state.clean[start:stop] = (predicted == y).cpu().numpy()
                state.robust[start:stop] = state.clean[start:stop]
                for index, file in enumerate(request.exported.values()):
                    other = file.predict(x.cpu())
                    state.exported_clean[index, start:stop] = (other == y.cpu()).numpy()
                    state.exported_robust[index, start:stop] = (
                        state.exported_clean[index, start:stop] & state.clean[start:stop]
                    )
                    counters.exported_mismatch[index] += int((other != predicted.cpu()).sum())
                counters.clean_done = stop
            advance(stop - start, f"clean {state.clean[:stop].mean():.1%}")


def attack_pass(request: Request, state: EvalState) -> Witness:
    """Run the remaining stages of the tier, each on the survivors of the previous ones.

    Returns:
        What noted the gradients that the attacks of this process saw.
    """
    counters = state.counters
    stages = request.stages(state)
    witness = Witness(request.attacked(state), request.seed)
    attacker = Attacker(
        witness,
        request.threat,
        counters.classes,
        request.section.steps,
        request.section.restarts,
        request.seed,
        request.precision,
    )
    for index in range(counters.stage, len(stages)):
        stage = stages[index]
        # The survivors when the stage began, also if it is resumed.
        standing = state.clean & ((state.fell < 0) | (state.fell >= index))
        active = torch.from_numpy(np.flatnonzero(standing))
        with track(f"{request.name}: {_title(request, stage, stages)}", len(active), counters.attacked) as advance:
            for start in range(counters.attacked, len(active), request.batch_size):
                indices = active[start : start + request.batch_size]
                with _timed(request, state):
                    _attack_batch(request, state, attacker, stage, index, indices, start)
                    counters.attacked = start + len(indices)
                # The estimate assumes that the other images survive as often as those attacked so far.
                so_far = state.robust[active[: counters.attacked]].mean() * standing.mean()
                advance(len(indices), f"robust about {so_far:.1%}")
        counters.stage, counters.attacked = index + 1, 0
    return witness


def _title(request: Request, stage: Stage, stages: tuple[Stage, ...]) -> str:
    if stage.kind == "pgd":
        steps, restarts = request.section.steps, request.section.restarts
        return f"PGD-{steps}, {restarts} restart{'s' if restarts != 1 else ''}"
    aimed = f", target {stage.rank} of {sum(s.kind == 'apgd-t' for s in stages)}" if stage.rank else ""
    return f"{stage.name.upper()}{aimed}"


def _attack_batch(
    request: Request, state: EvalState, attacker: Attacker, stage: Stage, index: int, indices: Tensor, start: int
) -> None:
    x, y = request.get(indices)
    rows = indices.numpy()
    watching = [i for i, differs in enumerate(state.counters.exported_differs) if differs]
    files = FileVerdicts(
        [list(request.exported.values())[i] for i in watching],
        y,
        torch.from_numpy(state.exported_robust[watching][:, rows]),
    )
    attack = _divided if request.shared else _attacked
    found = attack(attacker, stage, x, y, start, files)
    survives = found.right.numpy()
    state.robust[rows] = survives
    state.fell[rows[~survives]] = index
    state.counters.forwards += found.forwards
    state.counters.backwards += found.backwards
    if request.leads:
        for position, i in enumerate(watching):
            state.exported_robust[i, rows] &= found.standing[position].numpy()
        _score_exported(request, state, rows, found.worst, y)


@dataclass(frozen=True)
class _Attacked:
    """What a stage did to a batch: which images survive, their worst points, on which images each watching file stands
    (bool [F, N]), and the numbers of forward and backward passes; tensors are on the CPU."""

    right: Tensor
    worst: Tensor
    standing: Tensor
    forwards: int
    backwards: int


def _attacked(attacker: Attacker, stage: Stage, x: Tensor, y: Tensor, start: int, files: FileVerdicts) -> _Attacked:
    right, worst, counted = attacker.run(stage, x, y, start, files if files.files else None)
    return _Attacked(right.cpu(), worst.cpu(), files.standing, counted.forwards, counted.backwards)


def _divided(attacker: Attacker, stage: Stage, x: Tensor, y: Tensor, start: int, files: FileVerdicts) -> _Attacked:
    """Do the same, with the batch divided among all processes."""
    count = distributed.count()
    share = slice(distributed.index(), None, count)
    mine = None
    if len(y[share]):
        part = FileVerdicts(files.files, y[share], files.standing[:, share])
        mine = _attacked(attacker, stage, x[share], y[share], start, part)
    right, worst, standing = torch.ones(len(y), dtype=torch.bool), x.cpu().clone(), files.standing.clone()
    forwards = backwards = 0
    for position, found in enumerate(distributed.all_gather(mine)):
        if found is not None:
            right[position::count], worst[position::count] = found.right, found.worst
            standing[:, position::count] = found.standing
            forwards, backwards = forwards + found.forwards, backwards + found.backwards
    return _Attacked(right, worst, standing, forwards, backwards)


def _score_exported(request: Request, state: EvalState, rows: NDArray[np.int64], points: Tensor, y: Tensor) -> None:
    for index, file in enumerate(request.exported.values()):
        state.exported_robust[index, rows] &= (file.predict(points.cpu()) == y.cpu()).numpy()


def black_box_pass(request: Request, state: EvalState) -> None:
    """Attack up to 64 survivors of the model and of its exported forms with Square.

    For the model and forms that compute the same it is a test for masked gradients, made in tiers above ``pgd``. A form
    that computes something else, such as an int8 file, is attacked in every tier, since no gradient is its own.
    """
    stages = request.stages(state)
    if not stages:
        return
    counters, gradients_alone = state.counters, stages == (PGD,)
    if counters.black_box is None and not gradients_alone:
        counted = CountedModel(request.model)

        def exact(images: Tensor) -> Tensor:
            with tf32(False):
                logits: Tensor = counted(images)
                return logits

        with _timed(request, state):
            rows, points, y, fallen = _black_box(request, state.robust, exact, f"{request.name}: Square on survivors")
            state.robust[rows[fallen]] = False
            state.fell[rows[fallen]] = len(request.stages(state))
            _score_exported(request, state, rows, points, y)
            counters.forwards += counted.forwards
            counters.black_box = [len(rows), int(fallen.sum())]
    for index, (name, file) in enumerate(request.exported.items()):
        if name in counters.exported_black_box or (gradients_alone and not counters.exported_differs[index]):
            continue
        label = f"{request.name}: Square on its file ({name})"
        with _timed(request, state):
            rows, _, _, fallen = _black_box(request, state.exported_robust[index], file.logits, label)
            state.exported_robust[index, rows[fallen]] = False
            counters.exported_black_box[name] = [len(rows), int(fallen.sum())]


def _black_box(
    request: Request, survivors: Flags, predict: Predict, label: str
) -> tuple[NDArray[np.int64], Tensor, Tensor, Flags]:
    """Return the positions of the attacked survivors, their points, their labels, and which were misclassified."""
    rows = request.spread(CHECK_IMAGES, torch.from_numpy(np.flatnonzero(survivors))).numpy()
    x, y = request.get(torch.from_numpy(rows))
    if len(rows) == 0:
        return rows, x, y, np.zeros(0, dtype=np.bool_)
    with track(label, BLACK_BOX_QUERIES) as advance:

        def shown(images: Tensor) -> Tensor:
            advance()
            return predict(images)

        generator = torch.Generator().manual_seed(start_seed(request.seed, 0, BLACK_BOX))
        points = square(shown, x, y, request.threat, queries=BLACK_BOX_QUERIES, generator=generator)
    check_points(points, x, request.threat)
    with torch.no_grad():
        fallen = misclassified(predict(points).to(y.device), y).cpu().numpy()
    return rows, points, y, fallen


def sweep_pass(request: Request, state: EvalState) -> None:
    """Measure robust accuracy of 256 images at other radii, under PGD with one random start."""
    counters = state.counters
    chosen = request.spread(SWEEP_IMAGES).sort().values
    count, active = len(chosen), chosen[torch.from_numpy(state.clean)[chosen]]
    todo = [radius for radius in request.section.sweep if f"{radius:.9g}" not in counters.sweep]
    with track(f"{request.name}: other radii", len(todo)) as advance:
        for radius in todo:
            threat = ThreatModel(request.threat.norm, radius)
            with _timed(request, state):
                right = 0
                for start in range(0, len(active), request.batch_size):
                    x, y = request.get(active[start : start + request.batch_size])
                    survives, _, counted = worst_points(
                        request.attacked(state), x, y, threat,
                        steps=request.section.steps, restarts=1, seed=request.seed, batch=start,
                        precision=request.precision,
                    )  # fmt: skip
                    right += int(survives.sum())
                    counters.forwards += counted.forwards
                    counters.backwards += counted.backwards
                counters.sweep[f"{radius:.9g}"] = [right, count]
            advance()
