"""Couplings found by perturbing values, for models whose index mappings torch-pruning gets wrong.

Every convolution and linear layer returns fixed values, whatever its input, so that only the operations between layers
remain: splits, shifts, sums, gates, pools. When output channels of one layer are perturbed, the positions of other
layers' inputs that change with them are coupled to these channels.

As in group testing, about 2 log2(C) forward passes identify which of a layer's C channels changes a position. Each pass
perturbs another half of the channels, and a channel is excluded for every position that did not change although the
channel was perturbed. Norms and depthwise convolutions pass on exactly the channels that changed in their input. A
channel that changes every changed position is mixed into all of them (queries of an attention block, a mean over
channels) and is coupled to none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from .cutting import Place
from .graph import Coupling
from .probing import Probe, probing
from .types import GroupSlice

_SEED = 1735
_EXTRA_PROBES = 64
_DENSITY = 0.25  # share of channels perturbed in an extra pass: 1 / the number of channels that may meet in a position
_MOST_TOGETHER = 16  # most channels of one layer that are removed as one; more of them are mixed, not coupled
_OUTPUT: Place = ("", "out", -1)
_NOWHERE: Place = ("", "out", -2)  # positions coupled to it have no channels that could be cut one by one
Position = tuple[Place, int]


@dataclass(frozen=True)
class TracedGroup:
    """A coupling found by tracing, its root layer and its number of blocks (`ChannelGroup.blocks`)."""

    root: str
    coupling: Coupling
    blocks: int


def trace_groups(
    model: nn.Module, image: Tensor, *, taken: Iterable[GroupSlice] = (), skip: Collection[str] = ()
) -> list[TracedGroup]:
    """Return groups of coupled channels of `model`, not yet proved, in the order of their root layers.

    Args:
        model: in eval mode; it is not changed.
        image: one image [1, C, H, W].
        taken: positions of other groups; channels coupled to one of them are left out.
        skip: names of layers whose output channels are not followed.

    Raises:
        BrokenMapping: the model does not make the same calls in every forward pass.
    """
    components = _Components()
    with torch.no_grad(), probing(model) as probe:
        probe.start(image)
        held = {((s.target, s.side, s.dim), i) for s in taken for i in s.index}
        unresolved = [p for p in probe.producers() if any((p, i) not in held for i in range(probe.size(p)))]
        sources = [p for p in unresolved if p[0] not in skip]
        for source, memberships, reached in _probe_sources(probe, sources, image):
            _link(source, memberships, reached, probe, components)
    classes = [c for c in components.classes() if not any(p in held or p[0] in (_OUTPUT, _NOWHERE) for p in c)]
    roots = [p for p in sources if p[1] == "out"]
    return _groups(roots, classes)


class _Components:
    """Union-find over positions."""

    def __init__(self) -> None:
        self._parent: dict[Position, Position] = {}

    def find(self, member: Position) -> Position:
        parent = self._parent
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    def join(self, a: Position, b: Position) -> None:
        self._parent[self.find(a)] = self.find(b)

    def classes(self) -> list[list[Position]]:
        found: dict[Position, list[Position]] = {}
        for member in self._parent:
            found.setdefault(self.find(member), []).append(member)
        return list(found.values())


def _probe_sources(
    probe: Probe, sources: list[Place], image: Tensor
) -> Iterator[tuple[Place, Tensor, dict[int, Tensor]]]:
    """Yield each source, its perturbed channels in each pass [T, C] and, by call, changed inputs [T, positions]."""
    reach: dict[Place, frozenset[int]] = {}
    for source in sources:
        whole = torch.ones(probe.size(source), dtype=torch.bool)
        reach[source] = frozenset(i for i, seen in enumerate(probe.run(image, {source: whole})) if bool(seen.any()))
    followed = frozenset[int]().union(*(calls for source, calls in reach.items() if source[1] == "out"))
    reach = {source: calls for source, calls in reach.items() if source[1] == "out" or calls & followed}
    for together in _apart(reach):
        members = {s: _halves(probe.size(s)) for s in together}
        rounds = max(len(m) for m in members.values())
        seen = _passes(probe, image, members, rounds)
        layers = [s for s in together if s[1] == "out"]  # an ambiguous parameter is not linked at all
        unclear = {s: _random_sets(probe.size(s)) for s in layers if _is_unclear(members[s], reach[s], seen)}
        more = _passes(probe, image, unclear, _EXTRA_PROBES) if unclear else seen[:0]
        for source in together:
            sets, passes = members[source], seen[: len(members[source])]
            if source in unclear:
                sets, passes = torch.cat([sets, unclear[source]]), passes + more
            yield source, sets, {i: torch.stack([p[i] for p in passes]) for i in reach[source]}


def _apart(reach: Mapping[Place, frozenset[int]]) -> list[list[Place]]:
    """Partition the sources into sets that reach no call in common, so that one pass serves a whole set."""
    colours: list[tuple[set[int], list[Place]]] = []
    for source, calls in reach.items():
        for used, members in colours:
            if not used & calls and (source[1] != "param" or all(m[0] != source[0] for m in members)):
                used |= calls
                members.append(source)
                break
        else:
            colours.append((set(calls), [source]))
    return [members for _, members in colours]


def _passes(probe: Probe, image: Tensor, members: Mapping[Place, Tensor], count: int) -> list[list[Tensor]]:
    return [probe.run(image, {s: m[t] for s, m in members.items() if t < len(m)}) for t in range(count)]


def _halves(channels: int) -> Tensor:
    """Return sets of channels, bool [T, C]: for each binary digit, the channels with it and those without it."""
    numbers = torch.arange(channels)
    digits = torch.stack([(numbers >> b) & 1 == 1 for b in range(max(1, math.ceil(math.log2(max(2, channels)))))])
    return torch.cat([digits, ~digits])


def _random_sets(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.rand(_EXTRA_PROBES, channels, generator=generator) < _DENSITY


def _is_unclear(members: Tensor, reached: Iterable[int], seen: list[list[Tensor]]) -> bool:
    passes = seen[: len(members)]
    return any(bool((_possible(members, torch.stack([p[i] for p in passes])).sum(1) > 1).any()) for i in reached)


def _possible(members: Tensor, moved: Tensor) -> Tensor:
    """Return the channels that each position may depend on, bool [positions, C].

    A position changes in every pass that perturbs a channel on which it depends.

    Args:
        members: channels perturbed in each pass, bool [T, C].
        moved: positions that changed in each pass, bool [T, positions].
    """
    ruled_out = (~moved).float().T @ members.float()
    return (ruled_out == 0) & moved.any(0).unsqueeze(1)


def _link(source: Place, members: Tensor, reached: Mapping[int, Tensor], probe: Probe, components: _Components) -> None:
    if members.shape[1] == 1:
        return  # its only channel cannot be cut, and may weigh all the channels of others
    for index, moved in reached.items():
        place = probe.calls[index].entering if index < len(probe.calls) else _OUTPUT
        possible = _possible(members, moved)
        if source[1] == "param" and bool((possible.sum(1) > 1).any()):
            continue  # its positions are no channels there but, for instance, tokens that every channel sees
        # Nor is a position coupled to many channels, such as all those of a head's queries.
        many = possible.sum(1) > _MOST_TOGETHER
        blurred = possible[many].any(0)
        possible[many] = False
        possible[:, blurred] = False
        for channel in blurred.nonzero().flatten().tolist():
            components.join((source, channel), (_NOWHERE, 0))
        if bool((possible.sum(1) > 1).any()):
            # A channel that changes every changed position is mixed into it, as queries are into the values' channels.
            mixed = possible[possible.any(1)].all(0)
            possible &= ~mixed
            for channel in mixed.nonzero().flatten().tolist():
                components.join((source, channel), (_NOWHERE, 0))
        for positions, channels in _rows(possible):
            for position in positions:
                components.join((source, channels[0]), (place, position))
            for channel in channels[1:]:
                components.join((source, channels[0]), (source, channel))


def _rows(possible: Tensor) -> list[tuple[list[int], list[int]]]:
    """Group the positions by their possible channels; positions without any are left out."""
    alike: dict[bytes, list[int]] = {}
    for position in possible.any(1).nonzero().flatten().tolist():
        alike.setdefault(possible[position].numpy().tobytes(), []).append(position)
    return [(positions, possible[positions[0]].nonzero().flatten().tolist()) for positions in alike.values()]


def _groups(roots: list[Place], classes: list[list[Position]]) -> list[TracedGroup]:
    by_root: dict[Place, list[list[Position]]] = {}
    first = {root: i for i, root in enumerate(roots)}
    for members in classes:
        own = [p for p in members if p[0] in first]
        if own:
            by_root.setdefault(min((p[0] for p in own), key=first.__getitem__), []).append(members)
    found = [(root, channels, parts) for root in roots for channels, parts in _parts(root, by_root.get(root, []))]
    names = {root for root, _, _ in found}
    groups: dict[Place, TracedGroup] = {}
    for root, channels, parts in found:
        # Another kind of channels of a layer is called by a layer that it alone passes.
        others = (place for place, _ in channels[0] if place[1] == "out" and place not in names)
        name = root if root not in groups else next(others, root)
        groups.setdefault(name, _group(name, channels, parts))
    return list(groups.values())


def _parts(root: Place, classes: list[list[Position]]) -> Iterator[tuple[list[list[Position]], int]]:
    """Yield the classes of each group of a layer and its number of blocks.

    An equally long part for each kind make one group, in which parts of nearly equal length are shortened to the
    smallest, since the last part of torch.chunk may be smaller. Other kinds are groups of their own, the largest first.
    """
    classes = [c for c in classes if sum(p == root for p, _ in c) <= _MOST_TOGETHER]
    classes.sort(key=lambda members: min(i for p, i in members if p == root))
    parts = [list(part) for _, part in groupby(classes, key=_kind)]
    least = min((len(p) for p in parts), default=0)
    if all(len(p) - least <= len(parts) for p in parts):
        if parts:
            yield [c for p in parts for c in p[:least]], len(parts)
        return
    for kind, _ in Counter(map(_kind, classes)).most_common():
        yield [c for c in classes if _kind(c) == kind], 1


def _group(root: Place, channels: list[list[Position]], parts: int) -> TracedGroup:
    slices: dict[Place, dict[int, int]] = {root: {}}
    for number, members in enumerate(channels):
        for place, index in members:
            slices.setdefault(place, {})[index] = number
    coupling = Coupling(
        len(channels),
        tuple(
            GroupSlice(target, side, tuple(sorted(found)), tuple(found[i] for i in sorted(found)), dim)  # type: ignore[arg-type]
            for (target, side, dim), found in slices.items()
        ),
        reaches_output=False,
    )
    return TracedGroup(root[0], coupling, parts)


def _kind(members: list[Position]) -> tuple[tuple[Place, int], ...]:
    """Return the places in which a class has positions, and how many."""
    return tuple(sorted(Counter(place for place, _ in members).items()))
