"""Importance scores of the channels of each group, relative to the other channels of the group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..catalogue import CRITERIA
from ..errors import UsageError
from ..introspect.fingerprint import models_hash
from ..models import user_file
from ..models.wrappers import unwrap
from ..sensitivity.adversarial_set import AdversarialSet
from ..structure.types import ChannelGroup
from .group_weights import weight_of
from .scoring import Images, Scoring
from .weight_norms import is_out, weight_norm


def channel_scores(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: str = "adversarial_taylor",
    adv: AdversarialSet | None = None,
    clean: Images | None = None,
    *,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Score the channels of every group: higher is more important, mean 1 within each group.

    Args:
        model: on `device`; it is not changed.
        groups: groups of this model.
        criterion: a name from `catalogue.CRITERIA`, or ``file.py:function`` with a function from `Scoring` to scores.
        adv: adversarial set, for criteria that need it.
        clean: float images [N, C, H, W] in [0, 1] and int64 labels [N], for criteria that need them.
        batch_size: largest number of images in a batch.
        seed: random seed of the criterion.
        device: device on which to compute.

    Returns:
        Scores by group name, float64 [channels] on the CPU. A group whose scores are all zero keeps zeros.

    Raises:
        UsageError: the criterion is unknown, images that it needs are missing, its scores are missing, NaN, infinite
            or of another number, a user's criterion changed the model, a group has no layer that it can read, or
            `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    asked = Scoring(unwrap(model), groups, adv, clean, batch_size, seed, torch.device(device))
    function = CRITERIA.load(criterion)
    before = models_hash(asked.model) if user_file.is_reference(criterion) else ""
    with user_file.reported(criterion):
        raw = function(asked)
    if before and models_hash(asked.model) != before:
        raise UsageError(f"criterion {criterion!r} changed the model's weights or buffers. Let it work on a copy.")
    return {group.name: _normalised(group, criterion, _of(group, criterion, raw)) for group in groups}


def removal_order(group: ChannelGroup, scores: Tensor) -> Tensor:
    """Return the channels in the order of removal, least important first.

    With `blocks` > 1 the order takes one channel from each block in turn, so that removing any multiple of `blocks`
    channels keeps the blocks equal.

    Args:
        group: the group.
        scores: scores of its channels, [channels].

    Returns:
        A permutation of 0..channels-1, int64 [channels]; equal scores keep the order of the channels.

    Raises:
        UsageError: the number of scores differs from the number of channels.
    """
    if scores.shape != (group.channels,):
        raise UsageError(f"group {group.name!r} has {group.channels} channels, got scores of {tuple(scores.shape)}")
    rows = scores.view(group.blocks, -1)
    order = rows.argsort(dim=1, stable=True) + torch.arange(group.blocks).unsqueeze(1) * rows.shape[1]
    return order.t().reshape(-1)


def removed_fraction_curve(model: nn.Module, group: ChannelGroup, scores: Tensor) -> Tensor:
    """Return ρ_g(k), the relative size of the weight perturbation by removing the k least important channels.

    ρ_g(k) = ‖removed output slices‖_F / ‖W_g‖_F over the group's producers, where W_g are their full weights; the
    radii of MRS have the same scale.

    Args:
        model: the model of the group.
        group: the group.
        scores: scores of its channels, [channels]; `removal_order` sorts them.

    Returns:
        float64 [channels + 1] in [0, 1], ascending from 0; the last entry is 1 if the group cuts all outputs of its
        producers. All entries are 0 if the producers' weights are zero.

    Raises:
        UsageError: the producers' weights are not finite or cannot be read, or the number of scores is wrong.
    """
    model = unwrap(model)
    energy = weight_norm(model, group, is_out).square()
    weights = {id(w): w for s in group.slices if is_out(s) and (w := weight_of(model, s)) is not None}
    total = sum(float(w.detach().double().square().sum()) for w in weights.values())
    if not (math.isfinite(total) and torch.isfinite(energy).all()):
        raise UsageError(f"the weights of group {group.name!r} have norm {total**0.5}, expected a finite number")
    if total == 0:
        return energy.new_zeros(group.channels + 1)
    removed = energy[removal_order(group, scores)].cumsum(0) / total
    return torch.cat([removed.new_zeros(1), removed.clamp(max=1.0).sqrt()])


def _of(group: ChannelGroup, criterion: str, raw: object) -> Tensor:
    scores = raw.get(group.name) if isinstance(raw, dict) else None
    if not isinstance(scores, Tensor) or scores.shape != (group.channels,):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores if isinstance(raw, dict) else raw)
        raise UsageError(
            f"criterion {criterion!r} must return a dict with a tensor [{group.channels}] for group {group.name!r}, "
            f"it returned {found}."
        )
    return scores.detach().double().cpu()


def _normalised(group: ChannelGroup, criterion: str, scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).sum())
        raise UsageError(
            f"{criterion} gives {bad} of {len(scores)} channels of group {group.name!r} a score that is NaN or "
            "infinite. Check the model's weights; a diverged training leaves such values."
        )
    mean = scores.mean()
    return scores / mean if mean > 0 else scores
