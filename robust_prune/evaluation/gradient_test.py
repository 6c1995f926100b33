"""Agreement of a model's input gradient with finite differences of its outputs.

An attack that follows a false gradient finds nothing, and the model looks robust (Athalye et al., 2018, arXiv
1802.00420). Finite differences need forward passes alone, so a model cannot deceive them by its backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES = 32
DIRECTIONS = 16
STEP, SHORT_STEP = 4 / 255, 1 / 255
"""Half the length of a difference, in units of the [0, 1] pixel range. Steps of attacks are of these sizes, and shorter
ones drown in the rounding of models that compute in bfloat16 (median cosine 0.44 at a quarter of 1/255, 0.80 at 1/255,
0.97 at 4/255). The gradient of models without adversarial training changes over the longer one (0.89 to 0.96 at 4/255,
0.98 at 1/255)."""
OFFSET = 2 / 255
"""Largest distance of the points between the levels of 8-bit images from the images."""
LEAST_AGREEMENT, LEAST_AT_LENGTH = 0.85, 0.55
"""Of the median cosine: at one of the two steps, and at the longer one. Honest models had 0.89 or more at the longer,
those with false gradients 0.76 or less at both, those with a gradient that is right only nearby 0.50 or less at the
longer one (pilot in `benchmarks/README.md`)."""
POOR_AGREEMENT, POOR_SHARE = 0.5, 0.1
FINEST = 32
"""Largest number of random signs along a side of an image; differences along finer ones drown in rounding at large
images."""


def gradient_flags(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Return a warning if the input gradient disagrees with finite differences at images or between 8-bit levels.

    Cost: 2,048 forward passes of single images and 64 backward passes; up to twice as many where shorter differences
    decide.

    Args:
        model: maps [0, 1] images [N, C, H, W] to logits [N, K]; in eval mode with frozen parameters.
        x, y: images [N, C, H, W] in [0, 1] and labels [N]; the first 32 are used.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = x[:IMAGES], y[:IMAGES]
    between = x + OFFSET * (2 * torch.rand(x.shape, generator=generator).to(x) - 1)
    # At the ends of the pixel range a model may clip, and have another slope to either side.
    points = {"at the images": x, "between the levels of 8-bit images": between}
    for where, here in points.items():
        here = here.clamp(STEP, 1 - STEP)
        found = agreement(model, here, y, STEP, generator)
        if LEAST_AT_LENGTH <= found.median().item() < LEAST_AGREEMENT:
            found = agreement(model, here, y, SHORT_STEP, generator)
        median = found.median().item()
        if median < LEAST_AGREEMENT:
            return [
                f"The input gradient {where} is not that of the outputs: its median cosine with finite differences "
                f"is {median:.2f} (limit {LEAST_AGREEMENT}, {len(found)} images). Attacks that follow it find too "
                "little."
            ]
        poor = (found < POOR_AGREEMENT).float().mean().item()
        if poor > POOR_SHARE:
            return [
                f"On {100 * poor:.0f} % of images (limit {100 * POOR_SHARE:.0f} %) the input gradient {where} is zero "
                "or not that of the outputs, and attacks that follow it find too little."
            ]
    return []


def agreement(
    model: nn.Module, x: Tensor, y: Tensor, step: float = STEP, generator: torch.Generator | None = None
) -> Tensor:
    """Return for each image the cosine between predicted and measured changes of the margin along random directions.

    Each direction has random signs; a block of pixels shares one where an image has more than 32 of them on a side.
    Values near 1 say that the gradient is right; a gradient that is zero, or outputs that do not change, give 0.

    Args:
        model: maps images [N, C, H, W] to logits [N, K].
        x, y: points [N, C, H, W] and labels [N].
        step: half the length of the differences, in units of the [0, 1] pixel range.
        generator: random number generator of the directions, on the CPU.

    Returns:
        Cosines [N] in [-1, 1].
    """
    points = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = model(points).float()
        rival = logits.detach().scatter(1, y[:, None], -torch.inf).argmax(dim=1, keepdim=True)
        margin = _against(logits, y, rival)
        gradient = torch.autograd.grad(margin.sum(), points, allow_unused=True)[0] if margin.requires_grad else None
    slope = torch.zeros_like(x) if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
    predicted, measured = [], []
    for _ in range(DIRECTIONS):
        signs = _signs(x, generator)
        predicted.append((slope * signs).flatten(1).sum(dim=1))
        with torch.no_grad():
            ahead, behind = (_against(model(x + length * signs).float(), y, rival) for length in (step, -step))
        measured.append(ahead - behind)
    return _cosine(torch.stack(predicted, dim=1).double(), torch.stack(measured, dim=1).double())


def _against(logits: Tensor, y: Tensor, rival: Tensor) -> Tensor:
    return (logits.gather(1, rival) - logits.gather(1, y[:, None])).squeeze(1)


def _signs(x: Tensor, generator: torch.Generator | None) -> Tensor:
    size = [min(FINEST, side) for side in x.shape[-2:]]
    drawn = torch.randint(0, 2, (*x.shape[:2], *size), generator=generator).to(x) * 2 - 1
    return F.interpolate(drawn, size=x.shape[-2:], mode="nearest")


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    norms = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(norms > 0, (first * second).sum(dim=1) / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
