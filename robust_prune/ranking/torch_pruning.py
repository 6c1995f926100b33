"""torch-pruning's channel criteria, read through our groups.

Its importance classes walk a group as pairs of a dependency and positions. `_View` shows one of our proven groups in
that form, so the figures are torch-pruning's own while groups, ratios and rounding stay ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_pruning.pruner import function
from torch_pruning.pruner.importance import FPGMImportance, GroupHessianImportance, LAMPImportance

from ..console import track
from ..errors import UsageError
from ..structure.cutting import is_depthwise
from ..structure.reference import copy_model
from ..structure.types import ChannelGroup, GroupSlice

BASELINES = ("fpgm", "hessian", "lamp")
HESSIAN_IMAGES = 256
"""Each image takes a backward pass of its own."""


def baseline_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: str,
    clean: tuple[Tensor, Tensor] | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Scores of one of `BASELINES` as torch-pruning computes them.

    - ``fpgm``: summed distance of a filter to the others of its layer (He et al., CVPR 2019).
    - ``lamp``: group norm, divided by what remains above it (Lee et al., arXiv 2010.07611).
    - ``hessian``: Σ w²·mean_i g_i² with g_i the gradient of one image (Optimal Brain Damage with the empirical Fisher
      matrix). torch-pruning keeps the last image's square only, so the mean is made here.

    Args:
        model: left as it came.
        groups: of this model.
        criterion: one of `BASELINES`.
        clean: float images [N, C, H, W] in [0, 1] and labels [N]; needed by ``hessian``, which reads the first
            `HESSIAN_IMAGES`.
        device: where the model is.

    Returns:
        By group name, float64 [channels] on the CPU.

    Raises:
        UsageError: missing images, or a group without a layer that the criterion reads.
    """
    scorer: Any = {"fpgm": FPGMImportance, "lamp": LAMPImportance, "hessian": GroupHessianImportance}[criterion]()
    if criterion == "hessian":
        model = _with_mean_squares(model, clean, device)
    found = {}
    for group in groups:
        scores = scorer(_View(model, group))
        if scores is None or len(scores) != group.channels:
            raise UsageError(f"group {group.name!r} has no layer that criterion {criterion!r} can read. Try magnitude.")
        found[group.name] = scores.detach().double().cpu()
    return found


class _View:
    """One group in the form that torch-pruning's importance classes read."""

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
    # Both names of the same things: its classes use the one or the other.
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


def _with_mean_squares(model: nn.Module, clean: tuple[Tensor, Tensor] | None, device: torch.device) -> nn.Module:
    """A copy in eval mode whose parameters hold, as their gradient, the mean of squared single-image gradients."""
    if clean is None or len(clean[1]) == 0:
        raise UsageError("criterion 'hessian' needs clean images and labels, got none")
    images, labels = clean[0][:HESSIAN_IMAGES], clean[1][:HESSIAN_IMAGES]
    twin = copy_model(model).eval().requires_grad_(True)
    weights = [p for p in twin.parameters() if p.is_floating_point()]
    sums = [torch.zeros_like(weight) for weight in weights]
    with torch.enable_grad(), track("Channel importance, Hessian", len(labels)) as advance:
        for x, y in zip(images.split(1), labels.split(1), strict=True):
            loss = F.cross_entropy(twin(x.to(device, weights[0].dtype)), y.to(device))
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient.square()
            advance()
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total / len(labels)
    return twin
