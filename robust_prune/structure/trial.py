"""Cuts as transactions: a cut on a copy of the reference is compared with the masked reference, then kept or undone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product

import torch
from torch import Tensor, nn

from ..introspect.copies import copied
from ..models.branches import Branch
from .attention import Adaptation, Attention
from .comparison import compared, exchanged
from .cutting import (
    Cutter,
    Place,
    Shortened,
    gone_positions,
    module_tensor,
    old_to_new_sizes,
    place_size,
)
from .masking import masked
from .own_norms import find_own_norms
from .paths import Pass, paths_of, used_names
from .reference import first_line, images_like, make_reference
from .repairs import WORKED, Edit, apply_edits, kinds, repairs
from .smaller import smaller_example
from .types import ChannelGroup, Skipped

_MOST_REPAIRS = 64
_SUSPECT = 2  # number of failures of a kind of layer after which the others of this kind are cut alone


@dataclass(frozen=True)
class Candidate:
    """A group not yet proved, with the attention blocks whose inner width it is."""

    group: ChannelGroup
    attention: tuple[Attention, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether the group must be cut alone, since its cut needs a search: bundles and traced groups with blocks."""
        return bool(self.group.members) or (self.group.traced and self.group.blocks > 1)

    def other_layout(self) -> Candidate | None:
        """Return the candidate with the other row order of the fused attention layer, or None without such a layer."""
        other = self.attention[0].other_layout() if len(self.attention) == 1 and not self.group.members else None
        return Candidate(other.group(), (other,)) if other else None


@dataclass(frozen=True)
class Cut:
    """A candidate and its channels to remove; if they are all of them, the branch to take out and the groups in it."""

    candidate: Candidate
    removed: tuple[int, ...]
    branch: Branch | None = None
    inside: tuple[ChannelGroup, ...] = ()

    @property
    def keep(self) -> int:
        """Number of channels that are kept."""
        return self.candidate.group.channels - len(self.removed)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups that are cut."""
        return tuple(group.name for group in self.inside) or (self.candidate.group.name,)

    def places(self) -> dict[Place, list[int]]:
        """Return the removed positions of the dense model for each place."""
        if not self.branch:
            return gone_positions(self.candidate.group, self.removed)
        found: dict[Place, list[int]] = {}
        for group in self.inside:
            for place, positions in gone_positions(group, tuple(range(group.channels))).items():
                found.setdefault(place, []).extend(positions)
        return found


@dataclass(frozen=True)
class Outcome:
    """Result of a transaction.

    Attributes:
        reason: empty if the cut was kept, else why it was undone.
        error: relative error against the masked reference.
        edits: repairs of stale attributes, by the name of the group whose cut needs them.
        adaptations: adaptation of each attention block, by the name of its first producer.
    """

    reason: str
    error: float = 0.0
    edits: dict[str, tuple[Edit, ...]] = field(default_factory=dict)
    adaptations: dict[str, Adaptation] = field(default_factory=dict)


class Trial:
    """Transactions on a cut copy of a dense reference with random weights.

    Args:
        model: a classifier; it is not changed.
        example: one image [1, C, H, W].
        images: real images [N, C, H, W] in [0, 1], on which branches are found that other images do not take; random
            images by default.

    Attributes:
        dense: the dense reference.
        dtype: data type of both models: float64, or float32 where the model needs it.
        small: the cut copy.
        images: random images [2, C, h, w] on which the two are compared, smaller than `example` where that serves.
        norms: norms that users write, by name.
        paths: passes that show every part of the model with its own weights.
        proofs: those passes, on images of the size of `images`.

    Raises:
        UsageError: as `make_reference`, or the model does not run in train mode.
    """

    def __init__(self, model: nn.Module, example: Tensor, images: Tensor | None = None) -> None:
        self.dense, self.dtype = make_reference(model, example)
        self._own = copied(model)
        self.images = images_like(example, self.dtype)
        self.paths = paths_of(self._own, example, images, used_names(self.dense, self.images))
        if not self.paths.hidden:
            self.images = images_like(smaller_example(self.dense, example), self.dtype)
        self.norms = find_own_norms(self.dense, self.images)
        usual = Pass(self.images)
        self.proofs = tuple(step.like(self.images) for step in self.paths.passes)
        self._unseen = [step.to(self.dtype) for step in self.paths.passes if step not in self.paths.hidden]
        self._compared = [usual, *(step.to(self.dtype) for step in self.paths.hidden)]
        self._begin()

    def _begin(self) -> None:
        self.small = copied(self.dense)
        self.cutter = Cutter(self.small)
        self._removed: dict[Place, set[int]] = {}
        self._exact = [step for step in self._compared if self._repeats(step)]

    def restarted(self) -> bool:
        """Run the cut copy in train mode and on real images; if it fails, begin again, comparing on these as well."""
        try:
            for step in self._unseen:
                with torch.no_grad():
                    step.run(self.small)
        except Exception:
            self._compared, self._unseen = [*self._compared, *self._unseen], []
            self._begin()
            return True
        return False

    def more_passes(self, model: nn.Module) -> list[Tensor]:
        """Return the logits of passes over hidden parts of `model`, which is `dense`, with the user's own weights."""
        if not self.paths.hidden:
            return []
        with exchanged(model, self._own, self.dtype):
            return [step.to(self.dtype).run(model) for step in self.paths.hidden]

    def _repeats(self, step: Pass) -> bool:
        """Return whether a pass gives finite logits that do not depend on random numbers."""
        if step is self._compared[0]:
            return True
        with torch.no_grad():
            first, second = step.run(self.dense), step.again().run(self.dense)
        return bool(torch.equal(first, second) and torch.isfinite(first).all())

    def attempt(self, cuts: list[Cut]) -> Outcome:
        """Make `cuts` on the copy together, and undo them unless the copy then equals the masked reference."""
        saved = self.cutter.snapshot()
        removed = {place: set(found) for place, found in self._removed.items()}
        try:
            for cut in cuts:
                for place, positions in gone_positions(cut.candidate.group, cut.removed).items():
                    removed.setdefault(place, set()).update(positions)
            with masked(self.dense, removed, self.norms), torch.no_grad():
                wanted = [step.run(self.dense) for step in self._compared]
            outcome = self._cut_and_repair(cuts, wanted)
        except Exception as error:
            outcome = Outcome(f"{type(error).__name__}: {first_line(error)}")
        if outcome.reason:
            self.cutter.restore(saved)
        else:
            self._removed = removed
        return outcome

    def without_gradient(self, candidates: list[Candidate]) -> set[str]:
        """Return the names of groups on whose producers the logits do not depend; their cut cannot be proved."""
        names = dict.fromkeys(n for c in candidates for n in c.group.producers)
        if not names:
            return set()
        layers = {n: self.dense.get_parameter(f"{n}.weight") for n in names}
        logits = self.dense(self.images)
        direction = torch.linspace(1, 2, logits.numel()).to(logits).view_as(logits)
        gradients = torch.autograd.grad((logits * direction).sum(), list(layers.values()), allow_unused=True)
        moved = {n for n, g in zip(layers, gradients, strict=True) if g is not None and bool(g.any())}
        return {c.group.name for c in candidates if not moved & set(c.group.producers)}

    def _cut_and_repair(self, cuts: list[Cut], wanted: list[Tensor]) -> Outcome:
        done: list[tuple[Cut, dict[int, int], list[Shortened]]] = []
        scaled: dict[str, tuple[Edit, ...]] = {}
        for cut in cuts:
            group, before = cut.candidate.group, _sizes(self.small, [cut])
            shortened = self.cutter.cut(group, cut.removed)
            done.append((cut, old_to_new_sizes(before, _sizes(self.small, [cut]), group.blocks), shortened))
            if edits := self._scalings(group, cut.removed):
                scaled[group.name] = edits
                apply_edits(self.small, edits)
        saved = self.cutter.snapshot()
        first: Outcome | None = None
        for how in _adaptations(self.small, cuts):
            for repaired in self._repaired(done):
                for cut in cuts:
                    for attention in cut.candidate.attention:
                        attention.adapt(self.small, cut.keep, how[attention.producers[0]])
                reason, error = self._compare(wanted)
                if not reason:
                    WORKED.update(kinds(self.small, edits) for edits in repaired.values())
                    return Outcome("", error, _joined(scaled, repaired), how)
                first = first or Outcome(reason, error)
                self.cutter.restore(saved)
        return first or Outcome("there is no way to cut it")

    def _repaired(
        self, done: Sequence[tuple[Cut, dict[int, int], list[Shortened]]]
    ) -> Iterator[dict[str, tuple[Edit, ...]]]:
        """Repair stale attributes of the cut copy in ever other ways; yield what was done, by the name of the group.

        The caller undoes it. Of several cuts each is repaired as others were that passed before.
        """
        yield {}
        if len(done) == 1 and not done[0][0].candidate.attention:
            cut, sizes, shortened = done[0]
            found = list(islice(repairs(self.small, cut.candidate.group, sizes, shortened), _MOST_REPAIRS))
            for edits in sorted(found, key=lambda edits: kinds(self.small, edits) not in WORKED):
                apply_edits(self.small, edits)
                yield {cut.candidate.group.name: edits}
            return
        known: dict[str, tuple[Edit, ...]] = {}
        for cut, sizes, shortened in done if WORKED else ():
            ways = repairs(self.small, cut.candidate.group, sizes, shortened)
            edits = next((way for way in ways if kinds(self.small, way) in WORKED), ())
            apply_edits(self.small, edits)
            if edits:
                known[cut.candidate.group.name] = edits
        if known:
            yield known

    def _scalings(self, group: ChannelGroup, removed: tuple[int, ...]) -> tuple[Edit, ...]:
        """Return what makes up for the means over channels of norms that lost channels of a group."""
        edits = []
        for owner, norm in self.norms.items():
            name, dim = next(iter(norm.dims.items()))
            lost = gone_positions(group, removed).get((f"{owner}.{name}", "param", dim), ())
            if norm.scaled and lost:
                now = module_tensor(self.small.get_submodule(owner), name).shape[dim]
                edits += [Edit(owner, each, (now + len(lost)) / now, scale=True) for each in norm.scaled]
        return tuple(edits)

    def _compare(self, wanted: list[Tensor]) -> tuple[str, float]:
        worst = 0.0
        for step, logits in zip(self._compared, wanted, strict=True):
            with torch.no_grad():
                reason, error = compared(self.small, step, logits, self.dtype, exact=step in self._exact)
            if reason:
                where = "" if step is self._compared[0] else f" {step.where}"
                return f"the cut model{where} {reason}", error
            worst = max(worst, error)
        return "", worst


def _joined(*parts: Mapping[str, tuple[Edit, ...]]) -> dict[str, tuple[Edit, ...]]:
    joint: dict[str, tuple[Edit, ...]] = {}
    for name, edits in chain(*(part.items() for part in parts)):
        joint[name] = (*joint.get(name, ()), *edits)
    return {name: edits for name, edits in joint.items() if edits}


class Ledger:
    """Results of all transactions on a trial.

    Attributes:
        done: cuts that are proved and in place.
        failed: groups that were rolled back, with the reasons.
        lost: the cuts of `failed`, in the same order.
        edits: repairs of stale attributes, by the name of the group whose cut needs them.
        adaptations: adaptation of each attention block, by the name of its first producer.
        norms: norms that users write, by name.
        error: largest relative error of a proof.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.norms = trial.norms
        self.done: list[Cut] = []
        self.failed: list[Skipped] = []
        self.lost: list[Cut] = []
        self._failures: Counter[str] = Counter()
        self.edits: dict[str, tuple[Edit, ...]] = {}
        self.adaptations: dict[str, Adaptation] = {}
        self.error = 0.0

    def commit(self, cuts: list[Cut]) -> None:
        """Make the cuts together, and halve the set where they fail, so that few failures cost few attempts."""
        self._commit([cut for cut in cuts if not cut.candidate.alone])
        for cut in cuts:
            if cut.candidate.alone:
                self._commit([cut])

    def _commit(self, cuts: list[Cut]) -> None:
        if not cuts:
            return
        suspects = [cut for cut in cuts if self._failures[_kind(cut)] >= _SUSPECT] if len(cuts) > 1 else []
        if suspects:  # the same layer of other blocks failed alone, so halving would only be slow
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
        self.edits |= outcome.edits
        self.adaptations |= outcome.adaptations
        self.error = max(self.error, outcome.error)


def _kind(cut: Cut) -> str:
    """Return the group's name without numbers, which is the same for the corresponding layer of every block."""
    return re.sub(r"\d+", "#", cut.candidate.group.name)


def _sizes(model: nn.Module, cuts: list[Cut]) -> dict[Place, int]:
    parts = [part for cut in cuts for part in cut.candidate.group.slices]
    return {(p.target, p.side, p.dim): place_size(model, p) for p in parts}


def _adaptations(model: nn.Module, cuts: list[Cut]) -> Iterator[dict[str, Adaptation]]:
    """Yield adaptations of all attention blocks, equal within a class; with several cuts only the likeliest."""
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
