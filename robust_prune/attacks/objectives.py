"""Objectives that attacks maximise: per-sample functions of the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""Maps logits [N, K] to per-sample values [N]; an attack maximises their sum."""

Watch = Callable[[Tensor, Tensor], None]
"""Is told every iterate of an attack: points [M, C, H, W] and their positions in the batch (int64 [M])."""

DLR_CLASSES, TARGETED_DLR_CLASSES = 3, 4
"""Fewest classes for which the DLR and the targeted DLR loss are defined."""
_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the per-sample cross-entropy [N], in nats, of logits [N, K] to labels `y` [N]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the largest other logit minus the label's logit, [N]; it is positive where the image is misclassified."""
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    return (others.amax(1, keepdim=True) - own).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio (Croce & Hein, 2020, arXiv 2003.01690), [N]; needs three classes.

    The margin is divided by the difference between the largest and the third largest logit. The ratio is invariant to
    shifting and scaling the logits, so no scale can make its gradient vanish.
    """
    ordered = logits.sort(dim=1).values
    return margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + _TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the targeted DLR loss towards classes `target` [N], [N]; needs four classes (Croce & Hein, 2020)."""
    ordered = logits.sort(dim=1).values
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    return targeted_margin(logits, y, target) / (scale + _TINY)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the logit of `target` minus the logit of the label, [N]."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return whether each prediction is wrong or has a logit that is not finite, bool [N]."""
    return (logits.argmax(dim=1) != y) | ~torch.isfinite(logits).all(dim=1)


def classify(logits: Tensor) -> Tensor:
    """Return the predicted classes [N] of logits [N, K]; -1, which equals no label, where a logit is not finite."""
    finite = torch.isfinite(logits).all(dim=1)
    return torch.where(finite, logits.argmax(dim=1), torch.full_like(logits[:, 0], -1, dtype=torch.long))
