"""Random crop and horizontal flip of batches, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import plain_strides


@dataclass(frozen=True)
class Moves:
    """How the images of a batch are moved.

    Attributes:
        padding: pixels added on each side before the crop; 0 does not crop.
        down, right: position of each crop in the padded image, int64 [N, 1], or None without a crop.
        flipped: whether each image is flipped, bool [N, 1], or None if none is.
    """

    padding: int
    down: Tensor | None
    right: Tensor | None
    flipped: Tensor | None

    def of(self, share: slice) -> Moves:
        """Return the moves of a part of the batch."""
        parts = (None if part is None else part[share] for part in (self.down, self.right, self.flipped))
        return Moves(self.padding, *parts)


def draw_moves(count: int, padding: int, flip: bool, generator: torch.Generator) -> Moves:
    """Draw a crop for each of `count` images, and flip half of them.

    Args:
        count: number of images, N.
        padding: pixels added on each side; 0 does not crop.
        flip: whether to flip images horizontally; leave it out where this changes the class, as for digits.
        generator: random number generator on the images' device.
    """

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=generator.device)

    down = draw(2 * padding + 1) if padding else None
    flipped = draw(2).bool() if flip else None
    right = draw(2 * padding + 1) if padding else None
    return Moves(padding, down, right, flipped)


def crop_and_flip(images: Tensor, moves: Moves) -> Tensor:
    """Zero-pad images, crop each to its former size, and flip some of them.

    Args:
        images: uint8 [N, C, H, W].
        moves: the moves of these images, on their device.

    Returns:
        uint8 [N, C, H, W], in channels_last memory format unless C is 1.
    """
    count, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + (0 if moves.down is None else moves.down)
    columns = torch.arange(width, device=device).expand(count, -1)
    if moves.flipped is not None:
        columns = torch.where(moves.flipped, columns.flip(1), columns)
    if moves.right is not None:
        columns = columns + moves.right
        images = F.pad(images, (moves.padding,) * 4)
    rows = rows.expand(count, -1)
    sample = torch.arange(count, device=device)[:, None, None]
    moved = images[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return plain_strides(moved) if moved.shape[1] == 1 else moved
