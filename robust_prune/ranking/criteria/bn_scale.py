"""The scale of a channel in its batch-norm (network slimming, arXiv 1708.06519)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...structure.types import GroupSlice
from ..group_weights import per_channel, weight_of
from ..scoring import Scoring
from ..weight_norms import is_out, weight_norm


def score(asked: Scoring) -> dict[str, Tensor]:
    """Return the mean |weight| of the coupled batch-norms; groups without batch-norm use the magnitude.

    Raises:
        UsageError: no group has batch-norm, or a group without it has no weights.
    """
    model, groups = asked.model, asked.groups
    scores: dict[str, Tensor] = {}
    found = False
    for group in groups:
        total, count = torch.zeros(group.channels, dtype=torch.float64), 0
        for part in group.slices:
            weight = weight_of(model, part)
            if part.side == "norm" and weight is not None and _is_batch_norm(model, part):
                total += per_channel(model, part, weight.detach().double().abs(), group.channels)
                count += 1
        found |= count > 0
        scores[group.name] = total / count if count else weight_norm(model, group, is_out)
    if groups and not found:
        raise UsageError("criterion 'bn_scale' needs batch-norm layers, the model's groups have none. Try 'magnitude'.")
    return scores


def _is_batch_norm(model: nn.Module, part: GroupSlice) -> bool:
    return isinstance(model.get_submodule(part.target), nn.modules.batchnorm._BatchNorm)
