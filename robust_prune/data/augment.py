"""Random crop and horizontal flip of batches, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import plain_strides


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-pad images, crop each at a random position to its former size, and flip half of them.

    Args:
        images: uint8 [N, C, H, W].
        padding: pixels added on each side; 0 does not crop.
        flip: whether to flip images horizontally; leave it out where this changes the class, as for digits.
        generator: random number generator on the images' device.

    Returns:
        uint8 [N, C, H, W], in channels_last memory format unless C is 1.
    """
    count, _, height, width = images.shape
    device = images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=device)

    rows = torch.arange(height, device=device) + (draw(2 * padding + 1) if padding else 0)
    columns = torch.arange(width, device=device).expand(count, -1)
    if flip:
        columns = torch.where(draw(2).bool(), columns.flip(1), columns)
    if padding:
        columns = columns + draw(2 * padding + 1)
        images = F.pad(images, (padding,) * 4)
    rows = rows.expand(count, -1)
    sample = torch.arange(count, device=device)[:, None, None]
    moved = images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return plain_strides(moved) if moved.shape[1] == 1 else moved
