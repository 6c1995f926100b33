"""One cut as a transaction: made in a copy of the reference, compared with the masked reference, kept or undone."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, product, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Adaptation, Attention
from .cutting import CHANNEL_LAYERS, Cutter, Place, gone_positions, like, old_to_new_sizes, place_size
from .masking import masked
from .reference import first_line, images_like, make_reference, relative_error
from .types import ChannelGroup, Skipped

# Relative error of two exact computations of the same thing; a wrong channel costs percents.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
_MOST_REPAIRS = 64
_SUSPECT = 2  # failures of a kind of layer from which on the others of it are cut on their own


@dataclass(frozen=True)
class Candidate:
    """A group with what surgery must know beyond its slices: the attention blocks whose inner width it is."""

    group: ChannelGroup
    attention: tuple[Attention, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it takes a search to cut it, which only a cut on its own gets: splits into parts, bundles."""
        return bool(self.group.members) or (self.group.traced and self.group.blocks > 1)

    def other_layout(self) -> Candidate | None:
        """The same attention block with the rows of its fused layer in the other order, if there is one."""
        other = self.attention[0].other_layout() if len(self.attention) == 1 and not self.group.members else None
        return Candidate(other.group(), (other,)) if other else None


@dataclass(frozen=True)
class Cut:
    """A candidate and the channels that go."""

    candidate: Candidate
    removed: tuple[int, ...]

    @property
    def keep(self) -> int:
        """Channels that stay."""
        return self.candidate.group.channels - len(self.removed)


@dataclass(frozen=True)
class Edit:
    """An attribute of a module that a cut made stale.

    Attributes:
        module: the module's name.
        attribute: its name there; that of a parameter if `scale` is set.
        value: its new value, or what the parameter is multiplied by.
        scale: whether a parameter is multiplied.
    """

    module: str
    attribute: str
    value: Any
    scale: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a transaction ended.

    Attributes:
        reason: empty when it was kept, else why it was undone.
        error: relative error against the masked reference.
        edits: stale attributes that were repaired.
        adaptations: by the name of its first producer, how each attention block was told.
    """

    reason: str
    error: float = 0.0
    edits: tuple[Edit, ...] = ()
    adaptations: dict[str, Adaptation] = field(default_factory=dict)


class Trial:
    """A dense reference with random weights, its cut copy, and the images on which they are compared.

    Args:
        model: any model; it is not touched.
        example: one image [1, C, H, W].
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.dense, self.dtype = make_reference(model, example)
        self.small = copy.deepcopy(self.dense)
        self.cutter = Cutter(self.small)
        self.images = images_like(example, self.dtype)
        self._removed: dict[Place, set[int]] = {}

    def attempt(self, cuts: list[Cut]) -> Outcome:
        """Make `cuts` on the copy together; undo them unless it then equals the masked reference."""
        saved = self.cutter.snapshot()
        removed = {place: set(found) for place, found in self._removed.items()}
        try:
            for cut in cuts:
                for place, positions in gone_positions(cut.candidate.group, cut.removed).items():
                    removed.setdefault(place, set()).update(positions)
            with masked(self.dense, removed):
                wanted = self._run(self.dense)
            outcome = self._cut_and_repair(cuts, wanted)
        except Exception as error:
            outcome = Outcome(f"{type(error).__name__}: {first_line(error)}")
        if outcome.reason:
            self.cutter.restore(saved)
        else:
            self._removed = removed
        return outcome

    def without_gradient(self, candidates: list[Candidate]) -> set[str]:
        """Names of the groups whose producers do not move the logits at all: a proof of their cut would be empty."""
        names = dict.fromkeys(n for c in candidates for n in c.group.producers)
        if not names:
            return set()
        layers = {n: self.dense.get_parameter(f"{n}.weight") for n in names}
        logits = self.dense(self.images)
        direction = torch.linspace(1, 2, logits.numel()).to(logits).view_as(logits)
        gradients = torch.autograd.grad((logits * direction).sum(), list(layers.values()), allow_unused=True)
        moved = {n for n, g in zip(layers, gradients, strict=True) if g is not None and bool(g.any())}
        return {c.group.name for c in candidates if not moved & set(c.group.producers)}

    def _run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(self.images)

    def _cut_and_repair(self, cuts: list[Cut], wanted: Tensor) -> Outcome:
        before = _sizes(self.small, cuts)
        for cut in cuts:
            self.cutter.cut(cut.candidate.group, cut.removed)
        sizes = old_to_new_sizes(before, _sizes(self.small, cuts), cuts[0].candidate.group.blocks)
        saved = self.cutter.snapshot()
        first: Outcome | None = None
        for how in _adaptations(self.small, cuts):
            for cut in cuts:
                for attention in cut.candidate.attention:
                    attention.adapt(self.small, cut.keep, how[attention.producers[0]])
            repairs: Iterator[tuple[Edit, ...]] = iter([()])
            if len(cuts) == 1 and not cuts[0].candidate.attention:
                group = cuts[0].candidate.group
                stale = islice(_repairs(self.small, group, sizes), _MOST_REPAIRS)
                repairs = chain(stale, _mean_repairs(self.small, group, before))
            for edits in repairs:
                old = [getattr(self.small.get_submodule(e.module), e.attribute) for e in edits]
                apply_edits(self.small, edits)
                reason, error = self._compare(wanted)
                if not reason:
                    return Outcome("", error, edits, how)
                first = first or Outcome(reason, error)
                for edit, value in zip(edits, old, strict=True):
                    setattr(self.small.get_submodule(edit.module), edit.attribute, value)
            self.cutter.restore(saved)
        return first or Outcome("there is no way to cut it")

    def _compare(self, wanted: Tensor) -> tuple[str, float]:
        try:
            found = self._run(self.small)
        except Exception as error:
            return f"the cut model fails: {type(error).__name__}: {first_line(error)}", float("inf")
        difference = relative_error(found, wanted)
        if difference <= TOLERANCE[self.dtype]:
            return "", difference
        if found.shape != wanted.shape:
            return f"the cut model returns {tuple(found.shape)} instead of {tuple(wanted.shape)}", difference
        return f"the cut model differs from the masked dense model by {difference:.1e} (relative)", difference


class Ledger:
    """What the transactions on a trial came to.

    Attributes:
        done: cuts that are proven and in place.
        failed: groups that were rolled back, with the reason.
        lost: their cuts.
        edits: stale attributes that were repaired.
        adaptations: by the name of its first producer, how each attention block was told.
        error: largest relative error of a proof.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.done: list[Cut] = []
        self.failed: list[Skipped] = []
        self.lost: list[Cut] = []
        self._failures: Counter[str] = Counter()
        self.edits: list[Edit] = []
        self.adaptations: dict[str, Adaptation] = {}
        self.error = 0.0

    def commit(self, cuts: list[Cut]) -> None:
        """Make the cuts together; where they fail together, in halves: few failures cost few attempts."""
        self._commit([cut for cut in cuts if not cut.candidate.alone])
        for cut in cuts:
            if cut.candidate.alone:
                self._commit([cut])

    def _commit(self, cuts: list[Cut]) -> None:
        if not cuts:
            return
        suspects = [cut for cut in cuts if self._failures[_kind(cut)] >= _SUSPECT] if len(cuts) > 1 else []
        if suspects:  # the same layer of other blocks failed alone, so halving would only find out slowly
            self._commit([cut for cut in cuts if cut not in suspects])
            for cut in suspects:
                self._commit([cut])
            return
        outcome = self._trial.attempt(cuts)
        if outcome.reason and len(cuts) > 1:
            self._commit(cuts[: len(cuts) // 2])
            self._commit(cuts[len(cuts) // 2 :])
            return
        if outcome.reason and (other := cuts[0].candidate.other_layout()):
            second = [Cut(other, cuts[0].removed)]
            tried = self._trial.attempt(second)
            outcome, cuts = (outcome, cuts) if tried.reason else (tried, second)
        if outcome.reason:
            self.failed.append(Skipped(cuts[0].candidate.group.name, outcome.reason))
            self.lost += cuts
            self._failures[_kind(cuts[0])] += 1
            return
        self.done += cuts
        self.edits += outcome.edits
        self.adaptations |= outcome.adaptations
        self.error = max(self.error, outcome.error)


def _kind(cut: Cut) -> str:
    """The group's name without numbers: the same for a layer of every block."""
    return re.sub(r"\d+", "#", cut.candidate.group.name)


def apply_edits(model: nn.Module, edits: tuple[Edit, ...]) -> None:
    """Set repaired attributes, and scale parameters, by replacing them."""
    for edit in edits:
        module = model.get_submodule(edit.module)
        value = edit.value
        if edit.scale:
            old = module.get_parameter(edit.attribute)
            value = like(old.detach() * edit.value, old)
        setattr(module, edit.attribute, value)


def _sizes(model: nn.Module, cuts: list[Cut]) -> dict[Place, int]:
    parts = [part for cut in cuts for part in cut.candidate.group.slices]
    return {(p.target, p.side, p.dim): place_size(model, p) for p in parts}


def _adaptations(model: nn.Module, cuts: list[Cut]) -> Iterator[dict[str, Adaptation]]:
    """Ways of telling attention blocks, those of one class alike; with several cuts only the likeliest of each."""
    ways: dict[str, list[Adaptation]] = {}
    kind: dict[str, tuple[type, int]] = {}
    for cut in cuts:
        for block in cut.candidate.attention:
            name = block.producers[0]
            ways[name] = list(block.alternatives(model, cut.keep))
            kind[name] = type(model.get_submodule(block.owner)), len(ways[name])
    kinds = list(dict.fromkeys(kind.values()))
    choices = product(*(range(count) for _, count in kinds)) if len(cuts) == 1 else iter([(0,) * len(kinds)])
    for choice in islice(choices, _MOST_REPAIRS):
        nth = dict(zip(kinds, choice, strict=True))
        yield {name: found[nth[kind[name]]] for name, found in ways.items()}


def _repairs(model: nn.Module, group: ChannelGroup, sizes: dict[int, int]) -> Iterator[tuple[Edit, ...]]:
    """Sets of attributes that may be stale, fewest first: none, one, one name on all modules of a class, all.

    Looked at are the ancestors of the cut layers and those ancestors' other children, those around the root first.
    """
    yield ()
    ancestors = {""}
    for part in group.slices:
        name = part.target
        while name := name.rpartition(".")[0]:
            ancestors.add(name)
    stale: list[Edit] = []
    by_kind: dict[tuple[type, str], list[Edit]] = {}
    near = sorted(model.named_modules(), key=lambda named: -_shared(named[0], group.name))
    for name, module in near:
        if isinstance(module, CHANNEL_LAYERS) or not (name in ancestors or name.rpartition(".")[0] in ancestors):
            continue
        for attribute, value in vars(module).items():
            new = _renewed(value, sizes)
            if new != value:
                stale.append(Edit(name, attribute, new))
                by_kind.setdefault((type(module), attribute), []).append(stale[-1])
    yield from ((edit,) for edit in stale)
    yield from (tuple(edits) for edits in by_kind.values() if 1 < len(edits) < len(stale))
    if len(stale) > 1:
        yield tuple(stale)


def _shared(name: str, other: str) -> int:
    """How many ancestors two modules have in common."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), other.split("."), strict=False))
    )


def _mean_repairs(model: nn.Module, group: ChannelGroup, before: dict[Place, int]) -> Iterator[tuple[Edit, ...]]:
    """Sets of edits for a module that divides by a mean over the cut channels, as global response norm does.

    Of C channels C' stay. Where the masked model averages over C, zeros among them, the cut one averages over C' and
    gets C/C' times as much; one of the module's own cut parameters times C/C' makes up for that, and a small constant
    beside the mean has to grow as the mean did.
    """
    for part in group.slices:
        if part.side != "param":
            continue
        owner, _, own = part.target.rpartition(".")
        ratio = before[part.target, part.side, part.dim] / place_size(model, part)
        scaled = Edit(owner, own, ratio, scale=True)
        yield (scaled,)
        for name, value in vars(model.get_submodule(owner)).items():
            if type(value) is float:
                yield (scaled, Edit(owner, name, value * ratio))


def _renewed(value: Any, sizes: dict[int, int]) -> Any:
    if type(value) is int:
        return sizes.get(value, value)
    if type(value) in (tuple, list, torch.Size):
        return type(value)(_renewed(v, sizes) if type(v) is int else v for v in value)
    return value
