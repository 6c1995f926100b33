"""torch-pruning's channel criteria, computed on our groups.

torch-pruning's importance classes iterate over pairs of a dependency and positions. `_View` presents one of our proved
groups in that form, so the scores are torch-pruning's own, while groups, ratios and rounding are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_pruning.pruner import function

from ..console import track
from ..errors import UsageError
from ..structure.cutting import is_depthwise
from ..structure.reference import copy_model
from ..structure.types import ChannelGroup, GroupSlice
from .scoring import Images

HESSIAN_IMAGES = 256
"""Largest number of images of the Hessian criterion; each takes one backward pass."""


def baseline_scores(scorer: Any, criterion: str, model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Return the scores of one of torch-pruning's importance classes.

    Args:
        scorer: an instance of the class.
        criterion: name of the criterion, for messages.
        model: the model; it is not changed.
        groups: groups of this model.

    Returns:
        Scores by group name, float64 [channels] on the CPU.

    Raises:
        UsageError: a group has no layer that the criterion can read.
    """
    found = {}
    for group in groups:
        scores = scorer(_View(model, group))
        if scores is None or len(scores) != group.channels:
            raise UsageError(f"group {group.name!r} has no layer that criterion {criterion!r} can read. Try magnitude.")
        found[group.name] = scores.detach().double().cpu()
    return found


class _View:
    """A group in the form that torch-pruning's importance classes expect."""

    def __init__(self, model: nn.Module, group: ChannelGroup) -> None:
        self._items = [item for part in group.slices if (item := _item(model, part)) is not None]

    def __iter__(self) -> Iterator[tuple[Any, list[int]]]:
        return ((item.dep, item.idxs) for item in self._items)

    def __getitem__(self, position: int) -> Any:
        return self._items[position]


def _item(model: nn.Module, part: GroupSlice) -> Any:
    if part.side == "param":
        return None
    layer = model.get_submodule(part.target)
    handler = _handler(layer, part.side)
    if handler is None:
        return None
    # torch-pruning's classes use either of two names for the layer and for the pruning function.
    dep = SimpleNamespace(layer=layer, pruning_fn=handler, target=SimpleNamespace(module=layer), handler=handler)
    return SimpleNamespace(dep=dep, idxs=list(part.index), root_idxs=list(part.root))


def _handler(layer: nn.Module, side: str) -> Any:
    if isinstance(layer, nn.modules.conv._ConvNd) and not is_depthwise(layer):
        return function.prune_conv_out_channels if side == "out" else function.prune_conv_in_channels
    if isinstance(layer, nn.Linear):
        return function.prune_linear_out_channels if side == "out" else function.prune_linear_in_channels
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return function.prune_batchnorm_out_channels
    return function.prune_layernorm_out_channels if isinstance(layer, nn.LayerNorm) else None


def with_mean_squares(model: nn.Module, clean: Images, device: torch.device) -> nn.Module:
    """Return a copy in eval mode whose parameters' ``grad`` is the mean of squared per-sample gradients.

    It uses at most `HESSIAN_IMAGES` of the clean images and the cross-entropy.

    Raises:
        UsageError: a weight is re-parametrised.
    """
    # Evenly spaced, since the images may be sorted by class.
    few = torch.linspace(0, len(clean[1]) - 1, min(HESSIAN_IMAGES, len(clean[1]))).round().long()
    images, labels = clean[0][few], clean[1][few]
    copied = copy_model(model).eval().requires_grad_(True)
    weights = [p for p in copied.parameters() if p.is_floating_point()]
    sums = [torch.zeros_like(weight) for weight in weights]
    with torch.enable_grad(), track("Channel importance, Hessian", len(labels)) as advance:
        for x, y in zip(images.split(1), labels.split(1), strict=True):
            loss = F.cross_entropy(copied(x.to(device, weights[0].dtype)), y.to(device))
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient.square()
            advance()
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total / len(labels)
    return copied
