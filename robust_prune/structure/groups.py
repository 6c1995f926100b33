"""Groups of coupled channels, found in a model's graph and each proved by a trial cut before planning."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..errors import UsageError
from ..introspect.fingerprint import models_hash
from ..models.wrappers import unwrap
from .attention import Attention, find_attention
from .cutting import is_depthwise, place_size
from .graph import BoundedGraph, BrokenMapping, Coupling, couple
from .tracing import TracedGroup, trace_groups
from .trial import Candidate, Cut, Ledger, Trial
from .types import ChannelGroup, GroupSlice, Skipped

_SEED = 308
_MOST_TRACED = 4
_TRACED: dict[tuple[object, ...], list[TracedGroup]] = {}
"""Couplings of the last models that were traced."""


@dataclass(frozen=True)
class GroupSearch:
    """Groups that can be pruned, and layers that cannot.

    Attributes:
        groups: proved groups, in the order of their root layers in the model.
        skipped: layers whose channels are kept, each with the reason. The classifier and layers with one channel are in
            neither.
    """

    groups: tuple[ChannelGroup, ...]
    skipped: tuple[Skipped, ...]


def find_groups(model: nn.Module, example: Tensor, images: Tensor | None = None) -> GroupSearch:
    """Find every group of channels of `model` that can be cut, and prove each on a copy.

    A group is proved if the model with some of its channels removed equals the dense model with the same channels set
    to zero (random weights, float64, or float32 where the model needs it). All groups are cut together first; if that
    fails, the set is halved until the failing groups are known. Layers without a proved group are searched again by
    perturbing values (`tracing`). Layers that compute the logits are never cut.

    Branches that only training runs, or that only some of `images` take, are traced and proved as well; a layer that
    the logits of noise in eval mode do not depend on is not cut itself.

    Args:
        model: a classifier that maps images [N, C, H, W] to logits [N, K]; it is not changed. Wrappers (DataParallel,
            torch.compile) are removed first, and names are those of the inner model.
        example: one image [1, C, H, W] of the model's input size; only its shape and device matter.
        images: real images [N, C, H, W] in [0, 1], of several kinds; random images by default.

    Raises:
        UsageError: `example` has another shape, the model does not run on it in both modes or cannot be traced, or a
            weight is re-parametrised.
    """
    check_example(example)
    trial = Trial(unwrap(model), example, images)
    search = _search(trial)
    return _search(trial) if trial.restarted() else search


def _search(trial: Trial) -> GroupSearch:
    candidates, skipped = find_candidates(trial)
    without_gradient = trial.without_gradient(candidates)
    skipped += [
        Skipped(name, trial.paths.reasons.get(name, "the logits do not depend on it, so that a cut cannot be checked"))
        for name in sorted(without_gradient)
    ]
    ledger = Ledger(trial)
    ledger.commit([Cut(c, _trial_cut(c.group)) for c in candidates if c.group.name not in without_gradient])
    stuck = (*skipped, *ledger.failed)
    if stuck:
        traced = find_traced(trial, [cut.candidate.group for cut in ledger.done])
        without_gradient |= trial.without_gradient(traced)
        ledger.commit([Cut(c, _trial_cut(c.group)) for c in traced if c.group.name not in without_gradient])
        known = {c.group.name for c in candidates}
        lost = [c for c in ledger.lost if not (c.candidate.group.traced and c.candidate.group.name in known)]
        ledger.commit([Cut(c, _trial_cut(c.group)) for c in _bundles([c.candidate for c in lost])])
    done = [cut.candidate.group for cut in ledger.done]
    order = {name: i for i, (name, _) in enumerate(trial.dense.named_modules())}
    return GroupSearch(tuple(sorted(done, key=lambda group: order[group.name])), _remaining(stuck, ledger))


class Interleaved(BrokenMapping):
    """Raised where a part of a layer holds channels of several parts of the group."""


def check_example(example: Tensor) -> None:
    """Raise UsageError unless `example` is one image [1, C, H, W]."""
    if example.dim() != 4 or example.shape[0] != 1:
        raise UsageError(f"pruning needs one example image of shape [1, C, H, W], got {list(example.shape)}.")


def find_candidates(trial: Trial) -> tuple[list[Candidate], list[Skipped]]:
    """Return the groups of the trial's dense reference found in its graph, not yet proved, and the skipped layers."""
    model = trial.dense
    graph = BoundedGraph().build(model, trial.images[:1], trial.more_passes)
    blocks = find_attention(model, trial.images)
    in_attention = {name: block for block in blocks for name in block.producers}
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    claimed: dict[str, set[int]] = {}
    for block in blocks:
        _add_attention(block, candidates, skipped)
    layers = [m for m in graph.module2node if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    order = {m: i for i, m in enumerate(model.modules())}
    # A depthwise layer belongs to the group of its input; it is a root only if no other root reaches it.
    for module in sorted(layers, key=lambda m: (is_depthwise(m), order[m])):
        name = graph._module2name[module]
        if name in in_attention:
            continue
        taken = claimed.setdefault(name, set())
        free = [c for c in range(graph.get_out_channels(module)) if c not in taken]
        if not free or graph.get_out_channels(module) == 1:
            continue
        try:
            coupling = couple(graph, module, free)
            _claim(coupling, claimed)
            if not coupling.reaches_output:
                candidates.append(Candidate(_as_group(name, coupling, model, in_attention)))
        except BrokenMapping as error:
            claimed[name].update(free)
            skipped.append(Skipped(name, str(error)))
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(candidates, key=lambda c: position[c.group.name]), skipped


def find_traced(trial: Trial, found: Sequence[ChannelGroup]) -> list[Candidate]:
    """Return groups of the trial's dense reference found by `tracing`, not yet proved, without positions of `found`."""
    blocks = find_attention(trial.dense, trial.images)
    in_attention = {name: block for block in blocks for name in block.producers}
    taken = [part for group in found for part in group.slices]
    # A plan is applied by the process that made it, which has traced the model then.
    key = (models_hash(trial.dense), tuple(trial.images.shape), tuple(sorted(group.name for group in found)))
    if key not in _TRACED:
        try:
            _TRACED[key] = trace_groups(trial.dense, trial.images[:1], taken=taken, skip=in_attention.keys())
        except Exception:  # the model runs on made-up activations, which its code need not support
            _TRACED[key] = []
        while len(_TRACED) > _MOST_TRACED:
            del _TRACED[next(iter(_TRACED))]
    found_by_value = _TRACED[key]
    candidates = []
    for traced in found_by_value:
        with suppress(BrokenMapping):
            group = _as_group(traced.root, traced.coupling, trial.dense, in_attention, traced.blocks)
            candidates.append(Candidate(replace(group, traced=True)))
    return candidates


def _remaining(stuck: Sequence[Skipped], ledger: Ledger) -> tuple[Skipped, ...]:
    """Return the `stuck` layers that no proved group covers, each with the last reason found for it or its group."""
    covered = {producer for cut in ledger.done for producer in cut.candidate.group.producers}
    reasons = {
        producer: failed.reason
        for cut, failed in zip(ledger.lost, ledger.failed, strict=True)
        for producer in cut.candidate.group.producers
    } | {failed.name: failed.reason for failed in ledger.failed}
    return tuple(Skipped(r.name, reasons.get(r.name, r.reason)) for r in stuck if r.name not in covered)


def bundled(members: Sequence[Candidate]) -> Candidate:
    """Return one group that bundles groups with equal numbers of channels; its channel c is channel c of each member.

    A model's code may tie widths that the graph does not, for instance when an attention block reshapes its result to
    the width of its input. Any pairing of the members' channels is then valid.
    """
    groups = [m.group for m in members]
    group = ChannelGroup(
        groups[0].name,
        groups[0].channels,
        tuple(part for g in groups for part in g.slices),
        math.lcm(*(g.blocks for g in groups)),
        members=tuple(g.name for g in groups),
    )
    return Candidate(group, tuple(block for m in members for block in m.attention))


def _bundles(lost: Sequence[Candidate]) -> list[Candidate]:
    """Bundle the groups of equal width among those that cannot be cut alone."""
    by_width: dict[int, list[Candidate]] = {}
    for candidate in lost:
        by_width.setdefault(candidate.group.channels, []).append(candidate)
    bundles = [bundled(members) for members in by_width.values() if len(members) > 1]
    return [b for b in bundles if b.group.channels % b.group.blocks == 0 and b.group.channels >= 2 * b.group.blocks]


def _claim(coupling: Coupling, claimed: dict[str, set[int]]) -> None:
    for part in coupling.slices:
        if part.side == "out":
            claimed.setdefault(part.target, set()).update(part.index)


def _add_attention(block: Attention, candidates: list[Candidate], skipped: list[Skipped]) -> None:
    if block.obstacle:
        skipped.append(Skipped(block.producers[0], block.obstacle))
    elif block.head_dim < 2:
        skipped.append(Skipped(block.producers[0], "its heads have one dimension each"))
    else:
        candidates.append(Candidate(block.group(), (block,)))


def _as_group(
    name: str, coupling: Coupling, model: nn.Module, in_attention: dict[str, Attention], blocks: int = 1
) -> ChannelGroup:
    """Return the coupling as a group with at least `blocks` blocks.

    Raises:
        BrokenMapping: its channels cannot be removed, neither one by one nor block by block.
    """
    try:
        return _blocked(name, coupling, model, in_attention, blocks)
    except Interleaved as error:
        # A channel shuffle: the channels at the same position of every part are one channel.
        for parts in sorted({_parts(model, part) for part in coupling.slices} - {1}, reverse=True):
            if coupling.channels % parts == 0 and coupling.channels > parts:
                with suppress(BrokenMapping):
                    return _blocked(name, _folded(coupling, parts), model, in_attention, 1)
        raise error


def _folded(coupling: Coupling, parts: int) -> Coupling:
    """Return the coupling with the channels at the same position of its equal parts as one channel."""
    size = coupling.channels // parts
    slices = tuple(replace(part, root=tuple(root % size for root in part.root)) for part in coupling.slices)
    return replace(coupling, channels=size, slices=slices)


def _blocked(
    name: str, coupling: Coupling, model: nn.Module, in_attention: dict[str, Attention], blocks: int
) -> ChannelGroup:
    """Return the coupling as a group, of whose blocks the parts of its layers hold whole ones; see `_as_group`."""
    producers = {s.target for s in coupling.slices if s.side == "out"}
    if mixed := sorted(producers & in_attention.keys()):
        raise BrokenMapping(f"its channels are those of the attention heads of {mixed[0]}")
    if tied := _tied_parameter(model, {s.target for s in coupling.slices if s.side != "param"}):
        raise BrokenMapping(f"it shares the parameter {tied} with another layer")
    for part in coupling.slices:
        count = _parts(model, part)
        if count > 1 and not _spread(part, count, place_size(model, part)):
            _check_parts(part, count, coupling.channels, place_size(model, part))
            blocks = math.lcm(blocks, count)
    if coupling.channels == 1:
        raise BrokenMapping("it has one channel")
    if coupling.channels % blocks or coupling.channels // blocks < 2:
        raise BrokenMapping(f"it has {coupling.channels} channels in {blocks} blocks, so that none can go")
    return ChannelGroup(name, coupling.channels, coupling.slices, blocks)


def _tied_parameter(model: nn.Module, targets: set[str]) -> str:
    """Return the name of a parameter of `targets` that another module shares, or an empty string."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    for target in sorted(targets):
        for own_name, parameter in model.get_submodule(target).named_parameters(recurse=False):
            if len(owners[id(parameter)]) > 1:
                return f"{target}.{own_name}"
    return ""


def _parts(model: nn.Module, part: GroupSlice) -> int:
    """Return the number of equal parts (groups) into which the layer divides the positions of `part`."""
    if part.side == "param":
        return 1
    module = model.get_submodule(part.target)
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads
    if isinstance(module, nn.modules.conv._ConvNd) and not is_depthwise(module):
        return module.groups
    return 1


def _spread(part: GroupSlice, count: int, size: int) -> bool:
    """Return whether each channel has equally many positions in every part, so that any channel may be removed."""
    per_part = Counter((root, position * count // size) for position, root in zip(part.index, part.root, strict=True))
    return len(per_part) == count * len(set(part.root)) and len(set(per_part.values())) == 1


def _check_parts(part: GroupSlice, count: int, channels: int, size: int) -> None:
    """Raise BrokenMapping unless each part of the layer holds the channels of the same part of the group."""
    if len(part.index) != size or channels % count or size % channels:
        raise BrokenMapping(f"the {count} parts of {part.target} do not hold whole parts of its channels")
    for position, root in zip(part.index, part.root, strict=True):
        if position * count // size != root * count // channels:
            raise Interleaved(f"its channels are interleaved over the {count} parts of {part.target}")


def _trial_cut(group: ChannelGroup) -> tuple[int, ...]:
    """Return channels to remove for a proof: a random share that differs between groups, equal in each block.

    With the same share everywhere, groups whose widths the model's code ties would pass together and fail in a plan.
    """
    generator = random.Random(f"{_SEED} {group.name}")
    size = group.channels // group.blocks
    count = min(size - 1, max(1, round(size * generator.uniform(0.25, 0.75))))
    return tuple(sorted(b * size + c for b in range(group.blocks) for c in generator.sample(range(size), count)))
