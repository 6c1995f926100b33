"""How much each channel of a coupled group matters, relative to the other channels of that group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..catalogue import CRITERIA
from ..errors import UsageError
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
    """Scores the channels of every group: higher is more important, mean 1 within each group.

    Args:
        model: on `device`; left as it came.
        groups: of this model.
        criterion: a name of `catalogue.CRITERIA`, whose files say what each is, or ``file.py:function`` with a function
            from a `Scoring` to scores.
        adv: the adversarial set, for criteria that need it.
        clean: float images [N, C, H, W] in [0, 1] and int64 labels [N], for criteria that need them.
        batch_size: most images per pass.
        seed: of what is random.
        device: where to compute.

    Returns:
        By group name, float64 [channels] on the CPU. A group whose scores are all zero keeps zeros.

    Raises:
        UsageError: an unknown criterion, missing images, scores that are missing, NaN, infinite or of a wrong number,
            or a group with no layer that the criterion can read.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    asked = Scoring(unwrap(model), groups, adv, clean, batch_size, seed, torch.device(device))
    raw = CRITERIA.load(criterion)(asked)
    return {group.name: _normalised(group, criterion, _of(group, criterion, raw)) for group in groups}


def removal_order(group: ChannelGroup, scores: Tensor) -> Tensor:
    """Channels in the order in which they go, least important first.

    With `blocks` > 1 the order takes one channel from every block in turn, so that each multiple of `blocks` is a cut
    that keeps the blocks equal.

    Args:
        group: the group.
        scores: [channels].

    Returns:
        A permutation of 0..channels-1 (int64, [channels]); ties keep their order.

    Raises:
        UsageError: one score a channel is needed.
    """
    if scores.shape != (group.channels,):
        raise UsageError(f"group {group.name!r} has {group.channels} channels, got scores of {tuple(scores.shape)}")
    rows = scores.view(group.blocks, -1)
    order = rows.argsort(dim=1, stable=True) + torch.arange(group.blocks).unsqueeze(1) * rows.shape[1]
    return order.t().reshape(-1)


def removed_fraction_curve(model: nn.Module, group: ChannelGroup, scores: Tensor) -> Tensor:
    """Relative size ρ_g(k) of the weight perturbation that removing the k least important channels is.

    ρ_g(k) = ‖removed output slices‖_F / ‖W_g‖_F over the group's producers, with W_g their whole weights, so that it
    is on the scale of MRS's radii.

    Args:
        model: that the group belongs to.
        group: the group.
        scores: [channels]; the order is `removal_order`'s.

    Returns:
        float64 [channels + 1], ascending from 0; it ends at 1 if the group cuts all of its producers' outputs. All 0 if
        their weights are zero.

    Raises:
        UsageError: the producers' weights are not finite, or of a kind that cannot be read.
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
