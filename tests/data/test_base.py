"""Sets of images, and samples of them."""

from __future__ import annotations

import pytest
import torch
from builders.data_files import everything
from torch import nn

from robust_prune.data.augment import crop_and_flip, draw_moves
from robust_prune.data.base import (
    Subset,
    TensorImages,
    as_floats,
    batches,
    images_at_once,
    labels_of,
    stratified,
    stratified_order,
)


@pytest.mark.parametrize(("side", "count"), [(32, 256), (64, 256), (96, 113), (224, 20), (1024, 4)])
def test_fewer_large_images_are_attacked_at_once(side: int, count: int) -> None:
    images = TensorImages(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    assert images_at_once(images) == count
    assert images_at_once(images, 4) == 4


def labelled(labels: torch.Tensor) -> TensorImages:
    """Images that show their own number."""
    return TensorImages(torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None], labels)


SORTED = torch.arange(10).repeat_interleave(20)
GROUPED = torch.tensor([3, 5, 1, 0, 9, 8, 2, 4, 6, 7]).repeat_interleave(20)
UNEVEN = torch.cat([torch.zeros(150), torch.ones(40), torch.arange(2, 12)]).long()


@pytest.mark.parametrize("labels", [SORTED, SORTED.flip(0), GROUPED])
def test_a_sample_has_all_classes_however_the_set_is_sorted(labels: torch.Tensor) -> None:
    for count in (10, 25, 64, 100, 128):
        found = labels_of(stratified(labelled(labels), count)).bincount(minlength=10)
        assert found.sum() == count and found.max() - found.min() <= 1


def test_a_sample_keeps_the_shares_of_unequal_classes() -> None:
    found = labels_of(stratified(labelled(UNEVEN), 100)).bincount(minlength=12)
    assert abs(int(found[0]) - 75) <= 3 and abs(int(found[1]) - 20) <= 3 and 2 <= int(found[2:].sum()) <= 8


def test_a_smaller_sample_is_part_of_a_larger_one_and_a_seed_fixes_it() -> None:
    images = labelled(UNEVEN)
    small, large = (everything(stratified(images, n))[0].flatten().tolist() for n in (30, 60))
    assert large[:30] == small and len(set(large)) == 60
    assert everything(stratified(images, 30))[0].flatten().tolist() == small
    assert everything(stratified(images, 30, seed=1))[0].flatten().tolist() != small
    assert stratified(images, None) is images and stratified(images, 200) is images
    assert len(stratified(images, 0)) == 0 and sorted(stratified_order(UNEVEN).tolist()) == list(range(200))


def test_labels_are_known_without_images_where_the_set_has_them() -> None:
    class Unreadable:
        labels = SORTED

        def __len__(self) -> int:
            return len(SORTED)

        def get(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            raise AssertionError("an image was read")

    class Plain:
        def __len__(self) -> int:
            return 600

        def get(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(indices), 1, 2, 2, dtype=torch.uint8), indices % 7

    assert labels_of(Subset(Unreadable(), torch.tensor([199, 0]))).tolist() == [9, 0]
    assert torch.equal(labels_of(Plain()), torch.arange(600) % 7)


class Viewing(nn.Module):
    """Flattens the answer of a convolution by `view`, as the nets of courses do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).view(len(x), -1)


def test_grey_images_have_the_strides_that_view_needs() -> None:
    stored = torch.randint(256, (6, 8, 8, 1), dtype=torch.uint8).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="view"):
        Viewing()(stored.float())
    model, images = Viewing(), TensorImages(stored, torch.zeros(6, dtype=torch.long))
    assert torch.equal(images.images, stored)
    moved = crop_and_flip(images.get(torch.arange(6))[0], draw_moves(6, 2, True, torch.Generator().manual_seed(0)))

    class Foreign(TensorImages):
        def get(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return stored[indices], self.labels[indices]

    for x in (
        as_floats(stored),
        as_floats(images.images),
        moved.float(),
        next(batches(Foreign(stored, images.labels), 4))[0],
    ):
        assert model(x).shape == (len(x), 144)
        model(x.contiguous(memory_format=torch.channels_last))
    coloured = crop_and_flip(torch.zeros(2, 3, 4, 4).byte(), draw_moves(2, 1, True, torch.Generator()))
    assert coloured.is_contiguous(memory_format=torch.channels_last)
