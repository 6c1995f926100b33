"""Input of channel criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..sensitivity.adversarial_set import AdversarialSet
from ..structure.types import ChannelGroup

Images = tuple[Tensor, Tensor]
"""Float images [N, C, H, W] in [0, 1] and int64 labels [N]."""


@dataclass(frozen=True)
class Scoring:
    """Input of a channel criterion, which returns scores by group name, [channels]; higher is more important.

    The scale of scores does not matter: they are compared within a group and divided by their mean afterwards.

    Attributes:
        model: model without wrappers, on `device`; the criterion must not change it.
        groups: groups of this model.
        adv: adversarial set, if there is one.
        clean: clean images and labels, if there are any.
        batch_size: largest number of images in a batch.
        seed: random seed of the criterion.
        device: device of the model.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    adv: AdversarialSet | None = None
    clean: Images | None = None
    batch_size: int = 32
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def adversarial_images(self, criterion: str) -> Images:
        """Return the adversarial images and their labels.

        Args:
            criterion: name of the criterion, for the message.

        Raises:
            UsageError: there is no adversarial set.
        """
        if self.adv is None:
            raise UsageError(f"criterion {criterion!r} needs an adversarial set, got none")
        return self.adv.images, self.adv.labels

    def clean_images(self, criterion: str) -> Images:
        """Return the clean images and their labels.

        Args:
            criterion: name of the criterion, for the message.

        Raises:
            UsageError: there are no clean images.
        """
        if self.clean is None or len(self.clean[1]) == 0:
            raise UsageError(f"criterion {criterion!r} needs clean images and labels, got none")
        return self.clean
