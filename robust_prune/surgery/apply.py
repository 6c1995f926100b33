"""Applies a plan: every group is cut in a transaction, and the result is proved equal to the masked dense model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..budget.types import PlannedGroup, PruningPlan
from ..models.branches import Branch, taken_out
from ..models.wrappers import unwrap
from ..structure.branches import find_branch
from ..structure.cutting import Place
from ..structure.groups import bundled, check_example, find_candidates, find_traced
from ..structure.trial import Candidate, Cut, Ledger, Trial
from ..structure.types import ChannelGroup, Skipped
from .whole import prove_whole, removed_places


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
        branches: residual branches that lost all of their channels and were taken out.
    """

    model: nn.Module
    applied: tuple[PlannedGroup, ...]
    rolled_back: tuple[Skipped, ...]
    parity: float
    edits: tuple[str, ...] = ()
    removed: Mapping[Place, frozenset[int]] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()


def apply(model: nn.Module, plan: PruningPlan, example: Tensor, images: Tensor | None = None) -> Surgery:
    """Remove the channels named by `plan` from a copy of `model`.

    Groups are first cut in a reference with random weights and compared with the masked reference: all at once and, if
    that fails, in ever smaller sets down to single groups. A group that fails alone is rolled back; the others are
    cut. The same cuts are then made in a copy of the model, which is compared with the masked model and run backward,
    in eval mode and in train mode; a group that spoils this is rolled back too.

    A group that loses all of its channels is cut by taking out the residual branch that they form: what is left of it
    is a constant, in which the masked model agrees in eval mode. Other groups must keep a channel.

    Args:
        model: the dense model; it is not changed.
        plan: channels to remove, with the group names that `find_groups` gives for this model.
        example: one image [1, C, H, W]; only its shape and device matter.
        images: real images [N, C, H, W] in [0, 1], of several kinds; random images by default.

    Raises:
        UsageError: the model does not run on `example` in both modes or cannot be traced, or a weight is
            re-parametrised.
        QualityGateError: the model's logits or gradients are not finite, so that no cut can be proved.
    """
    check_example(example)
    base = unwrap(model)
    trial = Trial(base, example, images)
    known = _candidates(trial, plan)
    cuts: list[Cut] = []
    branches: list[Cut] = []
    skipped: list[Skipped] = []
    empty = {p.name: known[p.name].group for p in plan.groups if p.removed and not p.keep and p.name in known}
    inside = set[str]()
    for planned in plan.groups:
        if not planned.removed or planned.name in inside:
            continue
        reason = _invalid(planned, known.get(planned.name))
        if not reason and planned.name in empty:
            found = find_branch(trial.dense, empty[planned.name], trial.images)
            if found:
                # Other groups of a branch go with it, such as the inner one of squeeze and excitation.
                within = tuple(g for g in empty.values() if found.modules.issuperset(g.producers))
                branches.append(Cut(known[planned.name], planned.removed, found.branch, within))
                inside |= {group.name for group in within}
                continue
            reason = "all of its channels would go, and they are not those of a residual branch"
        if reason:
            skipped.append(Skipped(planned.name, reason))
        else:
            cuts.append(Cut(known[planned.name], planned.removed))
    skipped = [group for group in skipped if group.name not in inside]
    ledger = Ledger(trial)
    ledger.commit(cuts)
    if trial.restarted():
        ledger = Ledger(trial)
        ledger.commit(cuts)
    proved = prove_whole(base, ledger, branches, trial.proofs, example)
    done = [name for cut in proved.cuts for name in cut.names]
    edits = (edit for name in done for edit in ledger.edits.get(name, ()))
    return Surgery(
        proved.small,
        tuple(p for p in plan.groups if p.name in done),
        (*skipped, *ledger.failed, *proved.left_out),
        max(ledger.error, proved.error),
        tuple(f"{e.module}.{e.attribute}".lstrip(".") for e in edits),
        removed_places([cut for cut in proved.cuts if not cut.branch]),
        tuple(taken_out(proved.small).values()),
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
    counts = {sum(c * group.blocks // group.channels == b for c in removed) for b in range(group.blocks)}
    if len(counts) != 1:
        return f"each of its {group.blocks} blocks must lose the same number of channels"
    return ""
