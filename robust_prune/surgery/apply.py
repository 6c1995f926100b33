"""Applies a plan: every group is cut in a transaction, and the result is proved equal to the masked dense model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..budget.types import PlannedGroup, PruningPlan
from ..errors import QualityGateError
from ..models.wrappers import unwrap
from ..structure.cutting import Cutter, Place, gone_positions
from ..structure.groups import bundled, check_example, find_candidates, find_traced
from ..structure.masking import masked
from ..structure.reference import copy_model, first_line, images_like, precise_copy, relative_error
from ..structure.trial import TOLERANCE, Candidate, Cut, Ledger, Trial, apply_edits
from ..structure.types import ChannelGroup, Skipped


@dataclass(frozen=True)
class Surgery:
    """A pruned model and the result for each group of its plan.

    Attributes:
        model: the pruned model, a copy with the mode, `requires_grad` flags, memory format and hooks of the original.
        applied: groups that were cut.
        rolled_back: groups of the plan that were not cut, with the reasons.
        parity: largest relative error over all comparisons with the masked dense model.
        edits: stale attributes that were repaired, as ``module.attribute``.
        removed: removed positions of the original for each place (module, side, dimension) that was cut.
    """

    model: nn.Module
    applied: tuple[PlannedGroup, ...]
    rolled_back: tuple[Skipped, ...]
    parity: float
    edits: tuple[str, ...] = ()
    removed: Mapping[Place, frozenset[int]] = field(default_factory=dict)


def apply(model: nn.Module, plan: PruningPlan, example: Tensor) -> Surgery:
    """Remove the channels named by `plan` from a copy of `model`.

    Groups are first cut in a reference with random weights and compared with the masked reference: all at once and, if
    that fails, in ever smaller sets down to single groups. A group that fails alone is rolled back; the others are
    cut. The same cuts are then made in a copy of the model, which is compared with the masked model and run backward.

    Args:
        model: the dense model; it is not changed.
        plan: channels to remove, with the group names that `find_groups` gives for this model.
        example: one image [1, C, H, W]; only its shape and device matter.

    Raises:
        UsageError: the model does not run on `example` or cannot be traced, or a weight is re-parametrised.
        QualityGateError: the pruned model differs from the masked dense model although each cut was proved.
    """
    check_example(example)
    base = unwrap(model)
    trial = Trial(base, example)
    known = _candidates(trial, plan)
    cuts: list[Cut] = []
    skipped: list[Skipped] = []
    for planned in plan.groups:
        if not planned.removed:
            continue
        reason = _invalid(planned, known.get(planned.name))
        if reason:
            skipped.append(Skipped(planned.name, reason))
        else:
            cuts.append(Cut(known[planned.name], planned.removed))
    ledger = Ledger(trial)
    ledger.commit(cuts)
    small = copy_model(base)
    _replay(small, ledger)
    removed = _removed(ledger)
    parity = max(ledger.error, _whole_parity(base, small, removed, example))
    done = {c.candidate.group.name for c in ledger.done}
    return Surgery(
        small,
        tuple(p for p in plan.groups if p.name in done),
        (*skipped, *ledger.failed),
        parity,
        tuple(f"{e.module}.{e.attribute}".lstrip(".") for e in ledger.edits),
        removed,
    )


def _candidates(trial: Trial, plan: PruningPlan) -> dict[str, Candidate]:
    """Return the groups of the trial's model by name; traced and bundled ones are found as they were for the plan."""
    known = {c.group.name: c for c in find_candidates(trial)[0]}
    bundles = [p for p in plan.groups if p.members]
    single = [p for p in plan.groups if not p.members]
    traced = {p.name for p in single if p.traced} | {m for p in bundles for m in p.members if m not in known}
    if traced:
        others = [known[p.name].group for p in single if not p.traced and p.name in known]
        known |= {c.group.name: c for c in find_traced(trial, others) if c.group.name in traced}
    for bundle in bundles:
        members = [known[m] for m in bundle.members if m in known]
        if len(members) == len(bundle.members) and {m.group.channels for m in members} == {bundle.channels}:
            known[bundle.name] = bundled(members)
    return known


def _invalid(planned: PlannedGroup, candidate: Candidate | None) -> str:
    """Return why the planned cut cannot be made, or an empty string."""
    if candidate is None:
        return "the model has no prunable group of this name"
    group: ChannelGroup = candidate.group
    removed = set(planned.removed)
    if planned.channels != group.channels:
        return f"the plan expects {planned.channels} channels, the model has {group.channels}"
    if len(removed) != len(planned.removed) or not removed <= set(range(group.channels)):
        return f"the removed channels must be distinct and in 0..{group.channels - 1}"
    if len(removed) == group.channels:
        return "all of its channels would go"
    counts = {sum(c * group.blocks // group.channels == b for c in removed) for b in range(group.blocks)}
    if len(counts) != 1:
        return f"each of its {group.blocks} blocks must lose the same number of channels"
    return ""


def _replay(small: nn.Module, ledger: Ledger) -> None:
    """Make the proved cuts, attention adaptations and attribute repairs in `small`."""
    cutter = Cutter(small)
    for cut in ledger.done:
        cutter.cut(cut.candidate.group, cut.removed)
        for attention in cut.candidate.attention:
            attention.adapt(small, cut.keep, ledger.adaptations[attention.producers[0]])
    apply_edits(small, tuple(ledger.edits))


def _removed(ledger: Ledger) -> dict[Place, frozenset[int]]:
    removed: dict[Place, set[int]] = {}
    for cut in ledger.done:
        for place, positions in gone_positions(cut.candidate.group, cut.removed).items():
            removed.setdefault(place, set()).update(positions)
    return {place: frozenset(positions) for place, positions in removed.items() if positions}


def _whole_parity(base: nn.Module, small: nn.Module, removed: Mapping[Place, frozenset[int]], example: Tensor) -> float:
    """Return the relative error of the pruned model against the masked one, both with the model's own weights.

    Raises:
        QualityGateError: they differ, or the pruned model cannot be run forward and backward.
    """
    dense, dtype = precise_copy(base, example)
    exact = copy_model(small).to(dtype).eval()
    images = images_like(example, dtype).requires_grad_()
    with torch.no_grad(), masked(dense, removed):
        wanted = dense(images)
    try:
        found = exact(images)
        (gradient,) = torch.autograd.grad(found.square().sum(), images)
    except Exception as error:
        raise QualityGateError(
            f"the pruned model cannot be run forward and backward: {type(error).__name__}: {first_line(error)}. "
            "Please report the architecture."
        ) from error
    difference = relative_error(found.detach(), wanted)
    if not difference <= TOLERANCE[dtype] or not bool(torch.isfinite(gradient).all()):
        if not bool(torch.isfinite(wanted).all()):
            warnings.warn("the dense model's own logits are not finite, so that nothing can be compared", stacklevel=3)
        raise QualityGateError(
            f"the pruned model differs from the masked dense model by {difference:.1e} (relative; allowed "
            f"{TOLERANCE[dtype]:.0e}). It was not kept. Please report the architecture."
        )
    return difference
