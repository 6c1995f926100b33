"""Crops and mirrors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from robust_prune.data.augment import crop_and_flip, draw_moves


def test_crop_and_flip_move_whole_images():
    images = torch.arange(2 * 1 * 4 * 4, dtype=torch.uint8).view(2, 1, 4, 4) + 1
    same = crop_and_flip(images, draw_moves(2, 0, False, torch.Generator().manual_seed(0)))
    assert torch.equal(same, images)
    seen = set()
    for seed in range(40):
        out = crop_and_flip(images, draw_moves(2, 1, True, torch.Generator().manual_seed(seed)))
        assert out.shape == images.shape and out.dtype == torch.uint8
        padded = F.pad(images[0], (1, 1, 1, 1))
        windows = {
            (dy, dx, flip): (padded.flip(2) if flip else padded)[:, dy : dy + 4, dx : dx + 4]
            for dy in range(3)
            for dx in range(3)
            for flip in (False, True)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, out[0])]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10


def test_a_part_of_a_batch_moves_as_it_does_in_the_whole():
    images = torch.randint(256, (7, 3, 6, 6), dtype=torch.uint8)
    moves = draw_moves(7, 2, True, torch.Generator().manual_seed(0))
    whole, share = crop_and_flip(images, moves), slice(1, None, 3)
    assert torch.equal(crop_and_flip(images[share], moves.of(share)), whole[share])
