"""Proof of all cuts together on the model's own weights, in both modes; cuts that spoil it are left out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import QualityGateError, UsageError
from ..models.branches import NotABranchError, take_out
from ..structure.branches import mean_result
from ..structure.comparison import compared
from ..structure.cutting import Cutter, Place
from ..structure.masking import masked
from ..structure.paths import Pass
from ..structure.reference import copy_model, images_like, precise_copy
from ..structure.repairs import apply_edits
from ..structure.trial import Cut, Ledger
from ..structure.types import Skipped


@dataclass(frozen=True)
class Proved:
    """A cut model, the cuts in it, those left out with the reasons, and the largest relative error."""

    small: nn.Module
    cuts: tuple[Cut, ...]
    left_out: tuple[Skipped, ...]
    error: float


def prove_whole(
    base: nn.Module, ledger: Ledger, branches: Sequence[Cut], passes: Sequence[Pass], example: Tensor
) -> Proved:
    """Make the cuts of `ledger` in a copy of `base` and compare it with the masked `base`, forward and backward.

    Then `branches` are taken out. Their constants are those of eval mode, so values in train mode are not compared.

    If they differ, or the cut model fails, the cuts are halved until those that spoil it are known, and left out.

    Args:
        base: the dense model; it is not changed.
        ledger: cuts that were each proved on random weights.
        branches: cuts that take a branch out.
        passes: passes of the dense model that show every part of it.
        example: one image [1, C, H, W]; only its shape and device matter.

    Raises:
        QualityGateError: the model without any cut cannot be compared with itself.
    """
    proof = _Proof(base, ledger, passes, example)
    proved = _largest(proof, None, ledger.done)
    # Only without branches are values compared in train mode, so all other cuts are proved first.
    return _largest(proof, proved, branches) if branches else proved


def _largest(proof: _Proof, before: Proved | None, cuts: Sequence[Cut]) -> Proved:
    """Add as many of `cuts` as can be proved together to those that are proved `before`."""
    good = list(before.cuts) if before else []
    left_out = list(before.left_out) if before else []
    small, reason, error = proof.of([*good, *cuts])
    if not reason:
        return Proved(small, (*good, *cuts), tuple(left_out), error)
    if before:
        small, error = before.small, before.error
    else:
        small, nothing, error = proof.of([])
        if nothing:
            raise QualityGateError(
                f"the pruned model cannot be compared with the dense model: the dense model {nothing}."
            )
    parts = [list(cuts)]
    while parts:
        part = parts.pop()
        tried, reason, found = proof.of([*good, *part])
        if not reason:
            good, small, error = [*good, *part], tried, found
        elif len(part) > 1:
            parts += [part[len(part) // 2 :], part[: len(part) // 2]]
        else:
            left_out += [Skipped(name, f"the cut model {reason}") for name in part[0].names]
    return Proved(small, tuple(good), tuple(left_out), error)


def removed_places(cuts: Sequence[Cut]) -> dict[Place, frozenset[int]]:
    """Return the positions of the dense model that the cuts remove, for each place."""
    removed: dict[Place, set[int]] = {}
    for cut in cuts:
        for place, positions in cut.places().items():
            removed.setdefault(place, set()).update(positions)
    return {place: frozenset(positions) for place, positions in removed.items() if positions}


class _Proof:
    def __init__(self, base: nn.Module, ledger: Ledger, passes: Sequence[Pass], example: Tensor) -> None:
        self.base, self.ledger = base, ledger
        self.dense, self.dtype = precise_copy(base, example)
        self.passes = [Pass(images_like(example, self.dtype)), *(step.to(self.dtype) for step in passes)]
        self.exact = [not step.training or self._repeats(step) for step in self.passes]

    def _repeats(self, step: Pass) -> bool:
        with torch.no_grad():
            return torch.equal(step.run(self.dense), step.again().run(self.dense))

    def of(self, cuts: Sequence[Cut]) -> tuple[nn.Module, str, float]:
        """Return the model with the cuts, what is wrong with it or an empty string, and the largest relative error."""
        small = copy_model(self.base)
        _replay(small, [cut for cut in cuts if not cut.branch], self.ledger)
        branches = [cut for cut in cuts if cut.branch]
        exact = copy_model(small).to(self.dtype).eval()
        try:
            for cut in branches:
                _take_out(small, exact, cut, self.passes[0].images)
        except UsageError as failure:
            return small, f"fails: {failure}", float("inf")
        worst = 0.0
        for step, comparable in zip(self.passes, self.exact, strict=True):
            with torch.no_grad(), masked(self.dense, removed_places(cuts), self.ledger.norms):
                wanted = step.run(self.dense)
            if not bool(torch.isfinite(wanted).all()):
                warnings.warn(
                    "the dense model's own logits are not finite, so that nothing can be compared", stacklevel=4
                )
            comparable = comparable and not (branches and step.training)
            reason, error = compared(exact, step, wanted, self.dtype, exact=comparable, backward=True)
            if reason:
                return small, reason if step is self.passes[0] else f"{step.where} {reason}", error
            worst = max(worst, error)
        return small, "", worst


def _replay(small: nn.Module, cuts: Sequence[Cut], ledger: Ledger) -> None:
    """Make the cuts in `small`, with the attention adaptations and attribute repairs that `ledger` found for them."""
    cutter = Cutter(small)
    for cut in cuts:
        cutter.cut(cut.candidate.group, cut.removed)
        for attention in cut.candidate.attention:
            attention.adapt(small, cut.keep, ledger.adaptations[attention.producers[0]])
    for cut in cuts:
        apply_edits(small, ledger.edits.get(cut.candidate.group.name, ()))


def _take_out(small: nn.Module, exact: nn.Module, cut: Cut, images: Tensor) -> None:
    """Take a branch out of `small` and of its precise copy, with what the branch returns without its channels."""
    branch = cut.branch
    assert branch is not None
    with masked(exact, {place: positions for place, positions in cut.places().items() if positions}):
        try:
            value = mean_result(exact, branch, images)
        except NotABranchError as error:
            raise UsageError(str(error)) from error
    for model in (small, exact):
        take_out(model, replace(branch, channels=len(value)), value)
