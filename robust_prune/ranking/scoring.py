"""What a channel criterion is given."""

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
    """A request for scores. A criterion returns them by group name, [channels], higher is more important.

    Scores need no scale: they are compared within a group, and brought to mean 1 afterwards.

    Attributes:
        model: without wrappers, on `device`; it must stay as it is.
        groups: of this model.
        adv: the adversarial set, if there is one.
        clean: clean images, if there are any.
        batch_size: most images a pass.
        seed: of what is random.
        device: where the model is.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    adv: AdversarialSet | None = None
    clean: Images | None = None
    batch_size: int = 32
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def adversarial_images(self, criterion: str) -> Images:
        """Attacked images.

        Raises:
            UsageError: there are none.
        """
        if self.adv is None:
            raise UsageError(f"criterion {criterion!r} needs an adversarial set, got none")
        return self.adv.images, self.adv.labels

    def clean_images(self, criterion: str) -> Images:
        """Clean images.

        Raises:
            UsageError: there are none.
        """
        if self.clean is None or len(self.clean[1]) == 0:
            raise UsageError(f"criterion {criterion!r} needs clean images and labels, got none")
        return self.clean
