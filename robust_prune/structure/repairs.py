"""Repairs of attributes that a cut made stale: widths and sizes of segments that a module's code reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, permutations, takewhile
from typing import Any

from torch import nn

from .cutting import CHANNEL_LAYERS, Shortened, renewed
from .own_norms import scale
from .types import ChannelGroup

Kinds = tuple[tuple[type, str], ...]
"""Types of modules, each with the name of an attribute."""
WORKED: set[Kinds] = set()
"""Kinds of repairs that a proof has accepted in this process: what is tried first for the next block."""


@dataclass(frozen=True)
class Edit:
    """Repair of a module's attribute that a cut made stale.

    Attributes:
        module: qualified name of the module.
        attribute: name of the attribute, or of a tensor or float if `scale` is set.
        value: new value of the attribute, or factor.
        scale: whether what is there is multiplied by `value`.
    """

    module: str
    attribute: str
    value: Any
    scale: bool = False


def apply_edits(model: nn.Module, edits: tuple[Edit, ...]) -> None:
    """Set repaired attributes and scale tensors of `model`, in place."""
    for edit in edits:
        module = model.get_submodule(edit.module)
        if edit.scale:
            scale(module, [edit.attribute], edit.value)
        else:
            setattr(module, edit.attribute, edit.value)


def kinds(model: nn.Module, edits: Sequence[Edit]) -> Kinds:
    """Return the attributes that edits change, by the types of their modules."""
    return tuple(dict.fromkeys((type(model.get_submodule(e.module)), e.attribute) for e in edits))


def repairs(
    model: nn.Module, group: ChannelGroup, sizes: dict[int, int], shortened: Sequence[Shortened]
) -> Iterator[tuple[Edit, ...]]:
    """Yield sets of edits of attributes that may be stale: each alone, those of a class of modules, all.

    An attribute is stale if it holds an old size, or segments that fill a place that was cut: a list of them, or two
    numbers. The modules searched are the ancestors of the cut layers and the ancestors' other children, nearest to the
    root layer first.
    """
    ancestors = {""}
    for part in group.slices:
        name = part.target
        while name := name.rpartition(".")[0]:
            ancestors.add(name)
    stale: list[tuple[Edit, ...]] = []
    by_kind: dict[tuple[type, tuple[str, ...], int], list[tuple[Edit, ...]]] = {}
    near = sorted(model.named_modules(), key=lambda named: -_shared(named[0], group.name))
    for name, module in near:
        if isinstance(module, CHANNEL_LAYERS) or not (name in ancestors or name.rpartition(".")[0] in ancestors):
            continue
        for number, new in enumerate(_new_values(vars(module), sizes, shortened)):
            edits = tuple(Edit(name, attribute, value) for attribute, value in new.items())
            stale.append(edits)
            by_kind.setdefault((type(module), tuple(new), number), []).append(edits)
    yield from stale
    yield from (tuple(chain(*edits)) for edits in by_kind.values() if 1 < len(edits) < len(stale))
    if len(stale) > 1:
        yield tuple(chain(*stale))


def _new_values(
    values: Mapping[str, Any], sizes: dict[int, int], shortened: Sequence[Shortened]
) -> Iterator[dict[str, Any]]:
    """Yield new values of the attributes of a module that a cut may have made stale."""
    for attribute, value in values.items():
        if (new := renewed(value, sizes)) != value:
            yield {attribute: new}
        if type(value) in (list, tuple) and len(value) > 1 and all(type(v) is int for v in value):
            for lost in shortened:
                if (left := lost.segments(value)) and left != list(new):
                    yield {attribute: type(value)(left)}
    numbers = {attribute: value for attribute, value in values.items() if type(value) is int and value > 0}
    for one, other in permutations(numbers, 2):
        for lost in shortened:
            if left := lost.segments([numbers[one], numbers[other]]):
                yield {one: left[0], other: left[1]}


def _shared(name: str, other: str) -> int:
    """Return the number of leading components that two module names have in common."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), other.split("."), strict=False))
    )
