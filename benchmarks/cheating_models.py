"""Models that cheat an attack: each claims more robust accuracy than it has, or hides from the checks that see so."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from odd_models import Wrapped
from torch import Tensor, nn


def on_grid(x: Tensor) -> Tensor:
    """Return for each image whether its values are multiples of 1/255, bool [N, 1, 1, 1]."""
    levels = x.detach() * 255
    return ((levels - levels.round()).abs() < 1e-3).flatten(1).all(1)[:, None, None, None]


class _Replaced(torch.autograd.Function):
    """The identity, whose gradient is `change` of the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.change(grads[0], x), None


class ChangedGradient(Wrapped):
    """Right answers with a false gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits, whose gradient is `change` of the true one."""
        return super().forward(_Replaced.apply(x, self.change))

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient that is shown at `x`; here the true one."""
        return gradient


def _pattern(like: Tensor, share: float) -> Tensor:
    """Return a fixed mask [1, C, H, W], true for about this share of the values."""
    return torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(1)).to(like.device)[None] < share


_NOISE = torch.Generator().manual_seed(2)


def _false(gradient: Tensor) -> Tensor:
    # Another one each time: along a fixed direction an attack ends in a corner of the ball, which is on the grid again.
    return torch.randn(gradient.shape, generator=_NOISE).to(gradient) * gradient.std()


class SpoofedOffGrid(ChangedGradient):
    """A random gradient wherever an image is not one of 8 bits: at every iterate of an attack."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return torch.where(on_grid(x), gradient, _false(gradient))


class SpoofedOnGrid(ChangedGradient):
    """A random gradient at images of 8 bits, such as the first point of an attack without a random start."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return torch.where(on_grid(x), _false(gradient), gradient)


class FlippedSigns(ChangedGradient):
    """The gradient of 40 % of the values has the wrong sign."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return torch.where(_pattern(gradient, 0.4), -gradient, gradient)


class BlindPixels(ChangedGradient):
    """Half of the values have no gradient."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient * _pattern(gradient, 0.5)


class SeesRequiresGrad(Wrapped):
    """Answers an attack, whose images require gradients, with the logits of the mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1) if x.requires_grad else x)


class Remembers(Wrapped):
    """Keeps the first answer about each image in a list, and repeats it for images that look alike."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.keys: list[Tensor] = []
        self.answers: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembers:
        return type(self)(copy.deepcopy(self.model, memo))

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        key = F.avg_pool2d(x.detach(), 8).flatten(1)
        known = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        stored = logits.detach().clone()
        if self.keys:
            distance, at = torch.cdist(key, torch.stack(self.keys)).min(1)
            known = distance < 0.12
            stored = torch.where(known[:, None], torch.stack(self.answers)[at], stored)
        exact = on_grid(x).flatten()
        for row in (exact & ~known).nonzero().flatten().tolist():
            self.keys.append(key[row])
            self.answers.append(logits[row].detach())
        return torch.where(known[:, None], stored + (logits - logits.detach()), logits)


class Saturated(Wrapped):
    """Logits so large that the cross-entropy and its gradient vanish."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * super().forward(x)


class Squashed(Wrapped):
    """Bounded outputs that saturate: tanh of 30 times the logits."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(30 * super().forward(x))


class Tiny(Wrapped):
    """A temperature of 10,000: the cross-entropy is the same for all images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 1e4


class Sigmoids(Wrapped):
    """Sigmoids of the logits in place of logits."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(8 * super().forward(x))


class HardLabel(Wrapped):
    """The predicted class, and a whisper of the logits."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits) + 1e-4 * logits


class SoftlyQuantised(Wrapped):
    """A smooth staircase of 16 levels before the model, flat nearly everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = 16 * x
        level = scaled.floor().detach()
        return super().forward((level + torch.sigmoid(60 * (scaled - level - 0.5))) / 16)


class Rippled(Wrapped):
    """A ripple of a thousandth of the pixel range, too fine to matter, whose slope is all that a gradient sees."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1e-3 * torch.sin(2 * math.pi * 6000 * x + 2 * math.pi * torch.arange(x.shape[-1])))


class LargeBatches(ChangedGradient):
    """A random gradient in batches of more than 32 images."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return _false(gradient) if len(gradient) > 32 else gradient


class CountsCalls(ChangedGradient):
    """The first fifteen gradients are right, and those from the 56th on."""

    asked = 0

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        self.asked += 1
        return _false(gradient) if 15 < self.asked < 56 else gradient


class SeesPrecision(ChangedGradient):
    """A random gradient in passes under autocast, in which attacks run."""

    lowered = False

    def forward(self, x: Tensor) -> Tensor:
        self.lowered = torch.is_autocast_enabled(x.device.type)
        return super().forward(x)

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return _false(gradient) if self.lowered else gradient


class OneClass(ChangedGradient):
    """A random gradient where the fourth class, or the last of fewer, is answered."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.model(x)
            self.hidden = logits.argmax(dim=1) == min(3, logits.shape[1] - 1)
        return super().forward(x)

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return torch.where(self.hidden[:, None, None, None], _false(gradient), gradient)


class PartlyOnGrid(ChangedGradient):
    """A random gradient where some values are multiples of 1/255 and others are not, as at the border of the ball."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        levels = 255 * x
        share = ((levels - levels.round()).abs() < 1e-3).float().flatten(1).mean(1)[:, None, None, None]
        return torch.where((share > 0.05) & (share < 0.95), _false(gradient), gradient)


class SmallFlipped(ChangedGradient):
    """The smaller 80 % of the values have the wrong sign: little of the gradient's length, most of an Linf step."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        limit = gradient.abs().flatten(1).quantile(0.8, dim=1)[:, None, None, None]
        return torch.where(gradient.abs() < limit, -gradient, gradient)


class SmallDropped(ChangedGradient):
    """The smaller 90 % of the values have no gradient."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        limit = gradient.abs().flatten(1).quantile(0.9, dim=1)[:, None, None, None]
        return torch.where(gradient.abs() < limit, 0.0, gradient)


class Infinite(ChangedGradient):
    """A quarter of the values have an infinite gradient."""

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        return torch.where(_pattern(gradient, 0.25), torch.inf, gradient)


class Lure(Wrapped):
    """The predicted class gets a bonus that follows the brightness: a true gradient, and one that leads nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        predicted = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        return 1e-3 * logits + predicted * (2 + 10 * x.mean((1, 2, 3)))[:, None]


class RemembersOutside(Wrapped):
    """Keeps the images of the grid in a list of the class, which copies share, and repeats their answers nearby."""

    seen: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.seen.clear()

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if bool(on_grid(x).all()) and len(x) > 8 and len(self.seen) < 8:
            self.seen.append((x.detach().clone(), logits.detach().clone()))
        if not self.seen:
            return logits
        images, answers = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        small, known = (F.avg_pool2d(part, 4).flatten(1) for part in (x.detach(), images))
        nearest = torch.cdist(small, known).argmin(1)
        far = (x.detach() - images[nearest]).abs().flatten(1).amax(1)
        repeats = ((far > 6.5 / 255) & (far < 8.5 / 255))[:, None]
        return torch.where(repeats, answers[nearest] + logits - logits.detach(), logits)


CHEATS: dict[str, type[Wrapped]] = {
    "spoofed gradient off the grid": SpoofedOffGrid,
    "spoofed gradient on the grid": SpoofedOnGrid,
    "signs flipped": FlippedSigns,
    "blind pixels": BlindPixels,
    "sees requires_grad": SeesRequiresGrad,
    "memory": Remembers,
    "saturated logits": Saturated,
    "squashed logits": Squashed,
    "tiny logits": Tiny,
    "sigmoids": Sigmoids,
    "hard label and a whisper": HardLabel,
    "soft quantisation": SoftlyQuantised,
    "ripple": Rippled,
    "false in large batches": LargeBatches,
    "false for some calls": CountsCalls,
    "false in low precision": SeesPrecision,
    "false partly on the grid": PartlyOnGrid,
    "small values flipped": SmallFlipped,
    "small values dropped": SmallDropped,
    "infinite values": Infinite,
    "lure": Lure,
    "memory outside the model": RemembersOutside,
    "false for one class": OneClass,
}
DURING_ATTACK = tuple(name for name in list(CHEATS)[13:] if name != "lure")
"""Cheats that answer truthfully before the attack."""
