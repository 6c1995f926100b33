"""Random resized crops of images as they are stored, of any size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ImageSet, labels_of, originals

AT_ONCE = 16
"""Images that are held in memory as they are stored, which may be far larger than their crops."""


@dataclass(frozen=True)
class ResizedCrops:
    """Images of another set, randomly cropped and resized for one epoch.

    The crops are those of torchvision's ``RandomResizedCrop`` (Szegedy et al., arXiv 1409.4842), with sides at ratios
    of 3/4 to 4/3, resized bilinearly with antialiasing. The crop of an image depends on the seed, the epoch and its
    position only, so that it is the same in every process and in a resumed run.

    Attributes:
        base: the images, which are cropped as they are stored; see `originals`.
        size: (height, width) of the crops.
        smallest: smallest share of the area that a crop takes, in (0, 1].
        seed: random seed.
        epoch: number of the epoch.
    """

    base: ImageSet
    size: tuple[int, int]
    smallest: float
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.base)

    @property
    def labels(self) -> Tensor:
        """Labels, int64 [N]."""
        return labels_of(self.base)

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return crops (uint8 [N, C, H, W]) and labels (int64 [N]) at `indices` (int64 [N], N > 0)."""
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(self.size, scale=(self.smallest, 1.0), antialias=True)
        found, labels = [], []
        # torchvision draws from the global generator of the CPU.
        with torch.random.fork_rng([]):
            for part in indices.split(AT_ONCE):
                stored, classes = originals(self.base, part)
                labels.append(classes)
                for position, image in zip(part.tolist(), stored, strict=True):
                    torch.default_generator.manual_seed(self._seed_of(position))
                    found.append(crop(image))
        return torch.stack(found), torch.cat(labels)

    def _seed_of(self, position: int) -> int:
        text = f"crop:{self.seed}:{self.epoch}:{position}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
