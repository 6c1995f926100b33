"""Gradients that the attacks of an evaluation followed, compared with finite differences afterwards.

A model can answer a test truthfully and an attack falsely: by counting calls, by the size of the batch, by the
precision of the pass, or by the pixels of the points that attacks visit. What an attack was told is therefore noted
while it runs, at random steps and images, and measured afterwards by forward passes at the same points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CAPACITY, AT_ONCE = 96, 2
"""Number of gradients that are kept, and that one pass may add."""
DIRECTIONS = 8
LONG, SHORT = 4 / 255, 1 / 255
"""Half the length of a difference, in units of the [0, 1] pixel range; see `gradient_test`."""
LEAST_MEDIAN, LEAST_EACH, POOR_SHARE = 0.8, 0.5, 0.1
"""Limits on the cosines between predicted and measured changes: of their median, and of the share below the second."""
LEAST_GAIN = 0.6
"""Limit on the median ratio of measured to predicted change along the signs of the gradient, as Linf attacks step."""
MOST_UNSEEN = 0.2
"""Limit on the median change along values with gradient zero, relative to that along all values."""
MOST_NOT_FINITE = 0.1
OTHERWISE, FLAT = 0.25, 1e-2
"""Change of a logit that rounding in bf16 does not explain, relative to the spread over images, and spread below which
a logit counts as constant, relative to its size."""
MOST_OTHERWISE, MOST_ALONE = 0.02, 0.2
"""Limits on the share of points with such a change, without a gradient and in the neighbourhood."""
FEWEST = 16
_BATCH = 32


@dataclass(frozen=True)
class Noted:
    """Gradients as an attack saw them, M of them, on the CPU.

    Attributes:
        points: images [M, C, H, W] at which they were computed.
        logits: logits [M, K] that were answered there.
        weights: gradient of the attack's objective with respect to the logits, [M, K].
        gradients: gradient of the objective with respect to the images, [M, C, H, W].
    """

    points: Tensor
    logits: Tensor
    weights: Tensor
    gradients: Tensor


class Witness(nn.Module):
    """Answers as a model does, and keeps a random sample of the input gradients that are asked of it.

    Args:
        model: maps images [N, C, H, W] to logits [N, K].
        seed: random seed of the sample.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model = model
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._offered = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, K]."""
        logits: Tensor = self.model(x)
        if x.requires_grad and torch.is_grad_enabled() and logits.requires_grad and len(x):
            self._listen(x, logits)
        return logits

    def _listen(self, x: Tensor, logits: Tensor) -> None:
        places = []
        for _ in range(min(AT_ONCE, len(x))):
            # Reservoir sampling: each gradient of the evaluation has the same chance to be kept.
            self._offered += 1
            place = int(torch.randint(max(self._offered, CAPACITY), (), generator=self._generator))
            if place < CAPACITY or self._offered <= CAPACITY:
                places.append(place)
        if not places:
            return
        rows = torch.randint(len(x), (len(places),), generator=self._generator).to(x.device)
        points, answered = x.detach()[rows].float().cpu(), logits.detach()[rows].float().cpu()
        heard = dict[str, Tensor]()
        handles: list[Any] = []

        def weighed(weights: Tensor) -> None:
            heard["weights"] = weights.detach()[rows].float().cpu()

        def arrived(gradient: Tensor) -> None:
            for handle in handles:
                handle.remove()
            found = gradient.detach()[rows].float().cpu()
            for position, place in enumerate(places):
                item = (points[position], answered[position], heard["weights"][position], found[position])
                if len(self._kept) < CAPACITY:
                    self._kept.append(item)
                else:
                    self._kept[place] = item

        handles += [logits.register_hook(weighed), x.register_hook(arrived)]

    def noted(self) -> Noted | None:
        """Return what was kept, or None if that is too little to judge by."""
        if len(self._kept) < FEWEST:
            return None
        return Noted(*(torch.stack(parts) for parts in zip(*self._kept, strict=True)))


@torch.no_grad()
def witness_flags(model: nn.Module, noted: Noted, device: torch.device, norm: str) -> list[str]:
    """Return a warning if the gradients that attacks saw are not those of the model's outputs.

    Cost: 21 forward passes of single images for each gradient, 2,016 in all; 16 more where shorter differences decide,
    and 8 where gradients have zeros.

    Args:
        model: maps images [N, C, H, W] to logits [N, K]; in eval mode, in fp32.
        noted: what was kept, from this model.
        device: device of the model.
        norm: norm of the threat model.
    """
    finite = noted.gradients.flatten(1).isfinite().all(dim=1)
    lost = 1 - finite.float().mean().item()
    if lost > MOST_NOT_FINITE:
        return [f"{100 * lost:.0f} % of the gradients that the attack saw (limit 10 %) are not finite: it went astray."]
    noted = Noted(noted.points[finite], noted.logits[finite], noted.weights[finite], noted.gradients[finite])
    told = noted.gradients.flatten(1).norm(dim=1) > 0
    generator = torch.Generator().manual_seed(0)
    ask = _Asker(model, noted, device, generator)
    other = ask.otherwise()
    if other > MOST_OTHERWISE:
        return [
            f"At {100 * other:.0f} % of the points of the attack (limit {100 * MOST_OTHERWISE:.0f} %) the model "
            "answered it otherwise than it answers without a gradient: the attack was misled."
        ]
    alone = ask.alone()
    if alone > MOST_ALONE:
        return [
            f"At {100 * alone:.0f} % of the points of the attack (limit {100 * MOST_ALONE:.0f} %) the outputs are not "
            "those of the images 1/255 around: the model answers differently at the distance at which attacks end."
        ]
    found, along = ask.cosines(LONG)
    if found.median() < LEAST_MEDIAN or (found < LEAST_EACH).float().mean() > POOR_SHARE:
        found = torch.maximum(found, ask.cosines(SHORT)[0])
    median, poor = found.median().item(), (found < LEAST_EACH).float().mean().item()
    if median < LEAST_MEDIAN or poor > POOR_SHARE:
        return [
            "The gradients that the attack saw are not those of the outputs: their median cosine with finite "
            f"differences is {median:.2f} (limit {LEAST_MEDIAN}), and {100 * poor:.0f} % are below {LEAST_EACH} (limit "
            f"{100 * POOR_SHARE:.0f} %; {len(found)} gradients). The attack found too little."
        ]
    gain = ask.gains(told) if norm == "linf" else None
    if gain is not None and gain < LEAST_GAIN:
        return [
            f"Steps along the signs of the gradient change the outputs by {gain:.2f} times what it predicts (limit "
            f"{LEAST_GAIN}): many of its small values are wrong, which Linf attacks follow as much as the large ones."
        ]
    unseen = ask.unseen(along)
    if unseen > MOST_UNSEEN:
        return [
            f"Values of the images whose gradient is zero change the outputs {unseen:.2f} times as much as all values "
            f"do (limit {MOST_UNSEEN}): the attack could not use them."
        ]
    return []


class _Asker:
    """Measures changes of the attack's objective, linear in the logits, along directions in image space."""

    def __init__(self, model: nn.Module, noted: Noted, device: torch.device, generator: torch.Generator) -> None:
        self.model, self.noted, self.device, self.generator = model, noted, device, generator

    def otherwise(self) -> float:
        """Return the share of points at which the logits, asked for without a gradient, are clearly others."""
        return self._share_apart(self._logits(self.noted.points))

    def alone(self) -> float:
        """Return the share of points whose logits are clearly others than the mean of two neighbours' logits."""
        move = SHORT * self._signs()
        ahead, behind = (self._logits((self.noted.points + way).clamp(0, 1)) for way in (move, -move))
        return self._share_apart((ahead + behind) / 2)

    def _share_apart(self, logits: Tensor) -> float:
        spread, size = self.noted.logits.std(dim=0), self.noted.logits.mean(dim=0).abs()
        # A class that is ruled out by a large constant is rounded to more than the others vary.
        varies = spread > FLAT * size
        change = (logits - self.noted.logits)[:, varies].abs()
        return float((change > OTHERWISE * spread.max()).any(dim=1).float().mean())

    def cosines(self, step: float) -> tuple[Tensor, Tensor]:
        """Return for each gradient the cosine along random signs, and the root of the mean squared change."""
        pairs = [self._changes(step * self._signs()) for _ in range(DIRECTIONS)]
        predicted, measured = (torch.stack(parts, dim=1).double() for parts in zip(*pairs, strict=True))
        norms = predicted.norm(dim=1) * measured.norm(dim=1)
        cosines = torch.where(norms > 0, (predicted * measured).sum(dim=1) / norms.clamp_min(1e-300), 0.0)
        return cosines, measured.square().mean(dim=1).sqrt()

    def gains(self, told: Tensor) -> float | None:
        """Return the median ratio of measured to predicted change along the signs of those gradients."""
        if int(told.sum()) < FEWEST:
            return None
        predicted, measured = self._changes(SHORT * self.noted.gradients.sign())
        return float((measured[told] / predicted[told].clamp_min(1e-30)).median())

    def unseen(self, along: Tensor) -> float:
        """Return the median change along random signs of values with gradient zero, relative to `along` [M]."""
        zero = self.noted.gradients == 0
        if not zero.any():
            return 0.0
        changes = torch.stack([self._changes(LONG * self._signs() * zero)[1] for _ in range(DIRECTIONS // 2)], dim=1)
        each = changes.square().mean(dim=1).sqrt() / along.float().clamp_min(1e-30)
        return float(torch.where(along > 0, each, 0.0).median())

    def _signs(self) -> Tensor:
        drawn = torch.randint(0, 2, self.noted.points.shape, generator=self.generator)
        return drawn.float() * 2 - 1

    def _changes(self, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted and measured changes [M] between both ends of the moves, which stay in [0, 1]."""
        ahead, behind = (self.noted.points + moves).clamp(0, 1), (self.noted.points - moves).clamp(0, 1)
        predicted = ((ahead - behind) * self.noted.gradients).flatten(1).sum(dim=1)
        difference = self._logits(ahead) - self._logits(behind)
        return predicted, (difference * self.noted.weights).sum(dim=1)

    def _logits(self, images: Tensor) -> Tensor:
        return torch.cat([self.model(part.to(self.device)).float().cpu() for part in images.split(_BATCH)])
