"""Limits on the cut of single layers, by patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ..errors import UsageError
from ..recipe import PruningSection
from ..structure.groups import GroupSearch
from ..structure.types import ChannelGroup


def limited(search: GroupSearch, section: PruningSection) -> GroupSearch:
    """Return the groups with the smallest shares that ``pruning.keep`` and ``pruning.limits`` let them keep.

    A limit on one layer is one on all layers that lose channels together with it; of several limits the strictest
    counts.

    Args:
        search: groups that can be cut, and layers that cannot.
        section: the section ``pruning`` of the recipe.

    Raises:
        UsageError: a pattern fits neither a layer of a group nor a skipped one.
    """
    least = {pattern: 1.0 for pattern in section.keep}
    for pattern, removed in section.limits.items():
        least[pattern] = max(least.get(pattern, 0.0), 1 - removed)
    if not least:
        return search
    whole = [skipped.name for skipped in search.skipped]
    layers = [name for group in search.groups for name in (group.name, *group.producers)]
    for pattern in least:
        if not any(fits(pattern, name) for name in (*layers, *whole)):
            raise UsageError(
                f"no layer that can be cut fits {pattern!r}. Patterns are names such as {layers[0]}, or parts of them "
                "with * and ?; --dry-run shows all groups."
            )
    return replace(search, groups=tuple(_limited(group, least) for group in search.groups))


def fits(pattern: str, layer: str) -> bool:
    """Return whether a pattern fits a layer's qualified name, the end of it, or a module that contains it.

    Args:
        pattern: a name such as ``layer4``, or a pattern with ``*`` and ``?`` such as ``layer?.*.conv1``.
        layer: qualified name of a layer.
    """
    parts = layer.split(".")
    inner = [".".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for name in inner)


def _limited(group: ChannelGroup, least: dict[str, float]) -> ChannelGroup:
    names: Sequence[str] = (group.name, *group.producers)
    found = [share for pattern, share in least.items() if any(fits(pattern, name) for name in names)]
    return replace(group, least=max(found, default=0.0))
