"""What attacks maximise: per-sample functions of the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""Logits [N, K] -> [N]; an attack raises it."""

DLR_CLASSES, TARGETED_DLR_CLASSES = 3, 4
"""Fewest classes for which the difference-of-logits ratios are defined."""
_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy to labels `y`, in nats, [N]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus that of the label, [N]: positive where the image is misclassified."""
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    return (others.amax(1, keepdim=True) - own).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, 2020, arXiv 2003.01690), [N]; needs three classes.

    The margin over the distance of the largest from the third largest logit, so that it does not change when all logits
    are shifted or scaled, and no scale can make its gradient vanish.
    """
    ordered = logits.sort(dim=1).values
    return margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + _TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """DLR towards the classes `target` [N]; needs four classes (Croce & Hein, 2020)."""
    ordered = logits.sort(dim=1).values
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    return targeted_margin(logits, y, target) / (scale + _TINY)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Logit of `target` minus that of the label, [N]."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is not the label's, or a logit is not finite, [N]."""
    return (logits.argmax(dim=1) != y) | ~torch.isfinite(logits).all(dim=1)


def classify(logits: Tensor) -> Tensor:
    """Predicted classes ([N, K] -> [N]); -1, never right, where a logit is not finite."""
    finite = torch.isfinite(logits).all(dim=1)
    return torch.where(finite, logits.argmax(dim=1), torch.full_like(logits[:, 0], -1, dtype=torch.long))
