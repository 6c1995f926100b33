"""Honest models that look odd, which the alarms must not accuse; `alarms.py` tries them and `cheating_models.py`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Wrapped(nn.Module):
    """Answers as `model` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of images [N, C, H, W] in [0, 1]."""
        logits: Tensor = self.model(x)
        return logits


class Net(nn.Module):
    """Four convolutions and a linear layer; 0.5 M multiply-accumulates of a 32x32 image at width 8.

    Args:
        width: channels of the first convolution.
        norm: makes a normalization layer for a number of channels.
        classes: number of classes.
    """

    def __init__(self, width: int, norm: Callable[[int], nn.Module], classes: int = 10) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.Conv2d(before, after, 3, 1 + (index > 0), 1, bias=False), norm(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of images [N, 3, H, W] in [0, 1]."""
        logits: Tensor = self.head(self.features(x - 0.45))
        return logits


class Bfloat16Inside(Wrapped):
    """Computes in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x).float()


class MedianFilter(Wrapped):
    """A median filter of 3x3 before the model."""

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3)
        count, channels, height, width = x.shape
        return super().forward(
            patches.view(count, channels, 9, -1).median(2).values.view(count, channels, height, width)
        )


class Strided(Wrapped):
    """Every second row and column, enlarged again: three of four pixels are not looked at."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x[..., ::2, ::2], scale_factor=2.0, mode="bilinear"))


class LogEnsemble(Wrapped):
    """Logarithm of the mean probability of the model and of itself on the mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([super().forward(x).log_softmax(1), super().forward(x.flip(-1)).log_softmax(1)])
        return both.logsumexp(0) - math.log(2)


class TwoClasses(Wrapped):
    """Animals against vehicles of CIFAR-10, by the sums of their probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        logs = super().forward(x).log_softmax(1)
        vehicles = [0, 1, 8, 9]
        animals = [c for c in range(10) if c not in vehicles]
        return torch.stack([logs[:, animals].logsumexp(1), logs[:, vehicles].logsumexp(1)], 1)


class SoftmaxFree(Wrapped):
    """Unit-length logits times 10, as of a cosine classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.normalize(super().forward(x), dim=1)


class HalfStorage(Wrapped):
    """Weights that are kept in half precision and widened for each pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(copy.deepcopy(model))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.half().float())


class RuledOut(Wrapped):
    """A further class that a large negative logit rules out."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.cat([logits, torch.full_like(logits[:, :1], -1e4)], 1)


class TwoViews(Wrapped):
    """The larger logit of the image and of its mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(super().forward(x), super().forward(x.flip(-1)))


class Rounding(Wrapped):
    """Rounds to 8 bits, with the gradient of the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + ((255 * x).round() / 255 - x).detach())


class Nearest(Wrapped):
    """Nearest-neighbour reduction to 20 pixels and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(F.interpolate(x, size=20), size=x.shape[-1]))


TRAINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "standard training": (lambda: Net(32, nn.BatchNorm2d), "clean"),
    "tiny net": (lambda: Net(4, nn.BatchNorm2d), "n_fgsm"),
    "GroupNorm": (lambda: Net(32, lambda width: nn.GroupNorm(8, width)), "n_fgsm"),
}
"""Honest networks of their own, with the loss by which they are trained."""
HONEST: dict[str, type[Wrapped]] = {
    "as it is": Wrapped,
    "bf16 inside": Bfloat16Inside,
    "median filter": MedianFilter,
    "strides": Strided,
    "log-ensemble": LogEnsemble,
    "two classes": TwoClasses,
    "softmax-free": SoftmaxFree,
    "fp16 storage": HalfStorage,
    "a class ruled out": RuledOut,
    "larger of two views": TwoViews,
    "rounding to 8 bits": Rounding,
    "nearest neighbour": Nearest,
}
