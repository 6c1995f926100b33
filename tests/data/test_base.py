"""Sets of images."""

from __future__ import annotations

import pytest
import torch

from robust_prune.data.base import TensorImages, images_at_once


@pytest.mark.parametrize(("side", "count"), [(32, 256), (64, 256), (96, 113), (224, 20), (1024, 4)])
def test_fewer_large_images_are_attacked_at_once(side: int, count: int) -> None:
    images = TensorImages(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    assert images_at_once(images) == count
    assert images_at_once(images, 4) == 4
