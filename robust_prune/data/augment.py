"""Random crop and flip on whole batches, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-pads by `padding`, crops back at a random place, and mirrors half of the images when `flip`.

    Args:
        images: uint8 [N, C, H, W].
        padding: pixels on each side; 0 does not crop.
        flip: whether mirrored images keep their class (not so for digits).
        generator: source of randomness, on the images' device.

    Returns:
        uint8 [N, C, H, W], in channels_last memory order.
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
    return images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
