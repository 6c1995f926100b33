"""Residual branches whose channels can all be removed, each proved by a trial."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect.modes import eval_mode
from ..models.branches import Branch, NotABranchError, result_of, without
from .cutting import Place, gone_positions
from .masking import masked
from .types import ChannelGroup

_TOLERANCE = 1e-5
_BATCH = 64


@dataclass(frozen=True)
class Removable:
    """A branch that can be taken out, and the qualified names of the modules that go with it."""

    branch: Branch
    modules: frozenset[str]


@torch.no_grad()
def find_branch(model: nn.Module, group: ChannelGroup, images: Tensor) -> Removable | None:
    """Return the residual branch whose channels are those of `group`, or None.

    It is proved: the block without the branch equals the block in which all channels of the group are zero. A branch
    whose block is the whole model is not found.

    Args:
        model: the dense model; it is not changed.
        group: a group of this model.
        images: images [N, C, H, W] of the model's data type and device, at least two.
    """
    places = gone_positions(group, tuple(range(group.channels)))
    read = {target: set(positions) for (target, side, _), positions in places.items() if side == "in"}
    if not read or any(len(positions) < _inputs(model.get_submodule(name)) for name, positions in read.items()):
        return None
    targets = {target for target, side, _ in places if side != "param"}
    # Layers inside the branch may read its channels too (squeeze and excitation); they go with the last one.
    choices = [*((target,) for target in read), *([tuple(read)] if len(read) > 1 else [])]
    for name in _ancestors(targets):
        for chosen in choices:
            found = _proved(model, name, tuple(t.removeprefix(f"{name}.") for t in chosen), places, images)
            if found and targets <= found.modules:
                return found
    return None


@torch.no_grad()
def mean_result(model: nn.Module, branch: Branch, images: Tensor) -> Tensor:
    """Return the result of a branch, averaged over images and positions, [channels].

    Args:
        model: a model that has the branch; it runs in eval mode.
        branch: the branch; channels of its result may have been cut since it was found.
        images: images [N, C, H, W] in [0, 1].

    Raises:
        NotABranchError: the block does not run exactly once in a pass, or takes keywords.
    """
    result, like = result_of(model.get_submodule(branch.block), branch.readers), next(model.parameters())
    total: Tensor | None = None
    with eval_mode(model):
        result.eval()
        for part in images.split(_BATCH):
            found = result(*_inputs_of(model, branch.block, part.to(like)))
            mean = found.mean([dim for dim in range(found.dim()) if dim != branch.dim]) * len(part)
            total = mean if total is None else total + mean
    assert total is not None
    return total / len(images)


def _proved(
    model: nn.Module, name: str, readers: tuple[str, ...], places: Mapping[Place, Sequence[int]], images: Tensor
) -> Removable | None:
    block = model.get_submodule(name)
    try:
        result_of(block, readers)  # most blocks are ruled out by their code, before the model runs
        given = _inputs_of(model, name, images)
        branch = _described(block, Branch(name, readers, 0, 0, 0), given)
        with masked(model, places), eval_mode(model):
            small = without(block, branch, mean_result(model, branch, images))
            wanted, found = block(*_copied(given)), small(*_copied(given))
    except Exception:  # what a block does without a branch, or with other values, depends on its code
        return None
    if not torch.allclose(found, wanted, _TOLERANCE, _TOLERANCE * float(wanted.abs().max())):
        return None
    left = {n for n, _ in small.named_modules()}
    return Removable(branch, frozenset(f"{name}.{n}" for n, _ in block.named_modules() if n not in left))


def _inputs_of(model: nn.Module, block: str, images: Tensor) -> tuple[Any, ...]:
    """Return the positional inputs of a block in a pass of `model` in eval mode."""
    calls: list[tuple[Any, ...]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(() if kwargs else _copied(args))

    handle = model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with eval_mode(model):
            model(images)
    finally:
        handle.remove()
    if len(calls) != 1 or not calls[0]:
        raise NotABranchError("its block does not run exactly once in a pass, or takes keywords")
    return calls[0]


def _copied(args: Sequence[Any]) -> tuple[Any, ...]:
    """Copy tensors, which some blocks change in place."""
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def _described(block: nn.Module, branch: Branch, given: Sequence[Any]) -> Branch:
    """Return the branch with the channels and dimensions of its result.

    Raises:
        NotABranchError: the result depends on more than the channel.
    """
    with _only_channels(block, branch.readers), eval_mode(block):
        result = result_of(block, branch.readers)(*_copied(given))
    varied = [
        dim for dim in range(result.dim())
        if not torch.allclose(result, result.narrow(dim, 0, 1).expand_as(result))
    ]  # fmt: skip
    if len(varied) > 1 or varied == [0]:
        raise NotABranchError("its result differs between images or positions")
    dim = varied[0] if varied else (1 if result.dim() == 4 else result.dim() - 1)
    return replace(branch, channels=result.shape[dim], dims=result.dim(), dim=dim)


@contextmanager
def _only_channels(block: nn.Module, readers: Collection[str]) -> Iterator[None]:
    """Make each reader return another number in every channel, the same for all images and positions."""

    def hook(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        dim = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
        size = [output.shape[dim] if d == dim else 1 for d in range(output.dim())]
        steps = torch.linspace(0.1, 1.0, output.shape[dim], dtype=output.dtype, device=output.device)
        return steps.view(size).expand_as(output).clone()

    handles = [block.get_submodule(name).register_forward_hook(hook) for name in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(layer: Any) -> int:
    return int(layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.in_features)


def _ancestors(names: Collection[str]) -> Iterator[str]:
    """Yield the names of the modules that contain all of `names`, innermost first, without the model itself."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    for length in range(len(shared), 0, -1):
        yield ".".join(shared[:length])
