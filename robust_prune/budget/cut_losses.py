"""What a group's real cut does to the model's answers to attacked images, alone and repaired.

The estimators of `sensitivity.estimators` bound what the *worst* perturbation of a module's weights costs. Here each
group is cut to some widths, the others whole: the columns of its readers (the layers that read its channels) at the
removed channels become zero, and their other columns are solved anew by least squares where a reader is a plain
convolution or linear layer. All solutions follow from the Gram matrices XᵀX of the readers' dense inputs, which one
pass over some images gives. A residual branch is also taken out whole.

The loss of a cut is the Kullback-Leibler divergence of its predictions from those of the dense model, on images that
are adversarial to the dense model. It is not negative and has little noise. A rise of the cross-entropy is small beside
its noise where a group keeps half of its channels, and needs a new attack on each cut: images that are adversarial to
the dense model are less so to any other, and make many cuts look like gains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..attacks.pgd import pgd
from ..attacks.threat import ThreatModel
from ..console import track
from ..data.base import ImageSet, random_images
from ..errors import UsageError
from ..models.branches import take_out
from ..models.layout import fastest_passes
from ..ranking.importance import removal_order
from ..structure.branches import Removable, mean_result
from ..structure.cutting import gone_positions
from ..structure.least_squares import RIDGE, fits, images_at_once, input_rows, is_plain, single
from ..structure.masking import masked
from ..structure.types import ChannelGroup

SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Kept shares of a group's channels at which its loss is measured."""
IMAGES = 192
GRAM_IMAGES = 512
"""Images of the losses, and of the Gram matrices."""
STEPS = 10
"""Steps of the attack on the dense model."""
_BATCH = 64


@dataclass(frozen=True)
class CutLoss:
    """Loss of one cut.

    Attributes:
        keep: channels that stay.
        divergence: Kullback-Leibler divergence of the predictions from those of the dense model, mean over adversarial
            images, in nats.
        error: standard error of `divergence` over the images.
    """

    keep: int
    divergence: float
    error: float


CutLosses = Mapping[str, tuple[CutLoss, ...]]
"""Losses of a group's cuts, by the group's name."""


def measure_cuts(
    model: nn.Module,
    images: ImageSet,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    branches: Mapping[str, Removable],
    threat: ThreatModel,
    *,
    seed: int = 0,
) -> dict[str, tuple[CutLoss, ...]]:
    """Measure what cutting each group alone costs, at `SHARES` of its channels and, for branches, without any.

    Cost: for each cut, one forward pass on `IMAGES` images. Memory: the square matrices
    of all readers in float64, at most 1 GiB each.

    Args:
        model: the dense model, on its device; it is not changed.
        images: training images.
        groups: groups of this model.
        scores: scores of the channels by group name, [channels]; those with the lowest go first.
        branches: groups that are residual branches, by name.
        threat: norm and radius of the attack.
        seed: random seed of images and attack.

    Raises:
        UsageError: a loss is not finite.
    """
    like = next(model.parameters())
    drawn, labels = random_images(images, GRAM_IMAGES, seed)
    drawn, labels = drawn.to(like), labels.to(like.device)
    with frozen_eval(model):
        layout, bf16 = fastest_passes(model, drawn[:2])
        drawn = drawn.contiguous(memory_format=layout)
        with torch.autocast(drawn.device.type, torch.bfloat16, enabled=bf16):
            generator = torch.Generator().manual_seed(seed)
            attacked = pgd(model, drawn[:IMAGES], labels[:IMAGES], threat, steps=STEPS, generator=generator)
        shown = torch.cat([attacked, drawn[IMAGES:]])
        dense = _log_probabilities(model, attacked, bf16)

        def loss(keep: int) -> CutLoss:
            found = _log_probabilities(model, attacked, bf16)
            return _cut_loss(keep, F.kl_div(found, dense, reduction="none", log_target=True).sum(1))

        names = {name for group in groups for name in _readers(model, group)}
        grams = _gram_matrices(model, names, shown)
        found: dict[str, tuple[CutLoss, ...]] = {}
        with track("Sensitivity, real cuts", len(groups)) as advance:
            for group in groups:
                row = []
                if group.name in branches:
                    with _without_branch(model, branches[group.name], shown):
                        row.append(loss(0))
                for keep in _widths(group):
                    with _cut(model, group, keep, scores[group.name], grams):
                        row.append(loss(keep))
                found[group.name] = tuple(row)
                advance()
    return found


def _cut_loss(keep: int, each: Tensor) -> CutLoss:
    if not bool(each.isfinite().all()):
        raise UsageError(
            f"with a group of channels cut to {keep}, the logits of the model are not finite, so the loss of this cut "
            "cannot be measured. Choose another allocation than cuts."
        )
    # Rounding may make the divergence of nearly equal predictions negative.
    return CutLoss(
        keep, max(0.0, float(each.mean())), float(each.std(correction=min(1, len(each) - 1)) / len(each) ** 0.5)
    )


@torch.no_grad()
def _log_probabilities(model: nn.Module, images: Tensor, bf16: bool) -> Tensor:
    """Return the logarithms of the probabilities [N, K], in float32 or wider."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = torch.cat([model(part) for part in images.split(_BATCH)])
    return (logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits).log_softmax(1)


def _widths(group: ChannelGroup) -> list[int]:
    """Return the widths at `SHARES`, multiples of the group's blocks, ascending."""
    part = group.channels // group.blocks
    return sorted({group.blocks * max(1, round(share * part)) for share in SHARES} - {group.channels})


def _readers(model: nn.Module, group: ChannelGroup) -> dict[str, list[tuple[int, int]]]:
    """Return the plain layers that read a group's channels, each with pairs of (input position, channel)."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part in group.slices:
        if part.side == "in" and is_plain(model.get_submodule(part.target)):
            found.setdefault(part.target, []).extend(zip(part.index, part.root, strict=True))
    return found


@torch.no_grad()
def _gram_matrices(model: nn.Module, names: set[str], images: Tensor) -> dict[str, Tensor]:
    """Return XᵀX of the inputs of each layer that runs once in a pass, pads with zeros and is not too large."""
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            calls[name] = calls.get(name, 0) + 1
            given = args[0] if args else kwargs["input"]
            for part in given.split(images_at_once(layer, given)):
                rows = input_rows(layer, part)
                if rows is not None:
                    rows = single(rows)
                    found[name] = found.get(name, 0) + (rows.T @ rows).double()

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name), with_kwargs=True)
        for name in names if fits(layer := model.get_submodule(name))
    ]  # fmt: skip
    parts = images.split(_BATCH)
    try:
        for part in parts:
            model(part)
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram for name, gram in found.items() if calls[name] == len(parts)}


def _solved(layer: Any, gram: Tensor | None, gone: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer without the inputs `gone`, the others solved anew where the inputs are known.

    With all inputs, outputs are ``X W``. The best ``V`` for the kept inputs ``K`` is ``W_K + (G_KK + λI)⁻¹ G_KD W_D``,
    where ``G = XᵀX`` and ``D`` are the removed inputs.
    """
    weight = layer.weight.detach()
    flat = weight.reshape(len(weight), -1).double()
    dead = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    dead[list(gone)] = True
    dead = dead.repeat_interleave(flat.shape[1] // weight.shape[1])
    if layer.bias is not None:
        flat = torch.cat([flat, layer.bias.detach().double()[:, None]], 1)
        dead = torch.cat([dead, dead.new_zeros(1)])
    new = torch.where(dead, 0.0, flat)
    if gram is not None:
        kept = gram[~dead][:, ~dead]
        kept.diagonal().add_(max(RIDGE * float(kept.diagonal().mean()), 1e-12))
        new[:, ~dead] += torch.linalg.solve(kept, gram[~dead][:, dead] @ flat[:, dead].T).T
    bias = None if layer.bias is None else new[:, -1].to(weight.dtype)
    return new[:, : weight[0].numel()].reshape(weight.shape).to(weight.dtype), bias


@contextmanager
def _cut(
    model: nn.Module, group: ChannelGroup, keep: int, scores: Tensor, grams: Mapping[str, Tensor]
) -> Iterator[None]:
    """Set all but the `keep` best channels of a group to zero inside the block, with its readers solved anew."""
    gone = set(removal_order(group, scores)[: group.channels - keep].tolist())
    solved = []
    for name, pairs in _readers(model, group).items():
        layer: Any = model.get_submodule(name)
        weight, bias = _solved(layer, grams.get(name), [at for at, channel in pairs if channel in gone])
        solved += [(layer.weight, weight), *([] if bias is None else [(layer.bias, bias)])]
    with masked(model, gone_positions(group, tuple(sorted(gone)))), ExitStack() as undo:
        for parameter, new in solved:
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = new
        yield


@contextmanager
def _without_branch(model: nn.Module, removable: Removable, images: Tensor) -> Iterator[None]:
    """Take a branch out inside the block, with its mean result in its place."""
    owner, _, own = removable.branch.block.rpartition(".")
    block, parent = model.get_submodule(removable.branch.block), model.get_submodule(owner)
    take_out(model, removable.branch, mean_result(model, removable.branch, images))
    try:
        yield
    finally:
        setattr(parent, own, block)
