"""Geometry of the threat model: random starts, ascent steps and projections, all per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .threat import ThreatModel

TINY = 1e-12


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values [N] to [N, 1, ...] so that they broadcast over `like` [N, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def l2_norm(delta: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample of [N, ...], shaped [N, 1, ...]."""
    return per_sample(delta.flatten(1).norm(dim=1), delta)


def project(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Project `x_adv` [N, C, H, W] onto the epsilon-ball around `x`, then clip it to [0, 1]."""
    if threat.norm == "linf":
        low, high = (x - threat.epsilon).clamp_(min=0), (x + threat.epsilon).clamp_(max=1)
        return torch.minimum(torch.maximum(x_adv, low), high)
    delta = x_adv - x
    scale = (threat.epsilon / l2_norm(delta).clamp_min(TINY)).clamp_max(1)
    return (x + delta * scale).clamp_(0, 1)


_share: ContextVar[tuple[int, int]] = ContextVar("share", default=(0, 1))


@contextmanager
def share_of_batch(index: int, count: int) -> Iterator[None]:
    """Make random starts independent of how many processes share a batch.

    Inside the context the images at hand are those at positions `index`, `index + count`, `index + 2 * count`, ... of a
    batch that is divided among `count` processes. Each image gets the random start that it has in the full batch. All
    shares must be of equal size.
    """
    token = _share.set((index, count))
    try:
        yield
    finally:
        _share.reset(token)


def _draw(
    source: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    index, count = _share.get()
    device = generator.device if generator is not None else like.device
    drawn = source((count * shape[0], *shape[1:]), generator=generator, device=device, dtype=like.dtype)
    return drawn[index::count].to(like.device)


def random_start(x: Tensor, threat: ThreatModel, generator: torch.Generator | None = None) -> Tensor:
    """Return uniformly random points of the epsilon-ball around `x` [N, C, H, W], clipped to [0, 1].

    Random numbers are drawn on the generator's device, so that a CPU generator gives the same points on every device.
    """
    if threat.norm == "linf":
        noise = _draw(torch.rand, x, x.shape, generator) * 2 - 1
        return (x + threat.epsilon * noise).clamp_(0, 1)
    noise = _draw(torch.randn, x, x.shape, generator)
    radius = _draw(torch.rand, x, (len(x),), generator)
    radius = radius ** (1 / x[0].numel())
    return (x + threat.epsilon * per_sample(radius, x) * noise / l2_norm(noise).clamp_min(TINY)).clamp_(0, 1)


def ascent_step(x_adv: Tensor, gradient: Tensor, step_size: float | Tensor, threat: ThreatModel) -> Tensor:
    """Return `x_adv` after one steepest-ascent step of length `step_size` in the threat model's norm, not projected."""
    if threat.norm == "linf":
        return x_adv + step_size * gradient.sign()
    return x_adv + step_size * gradient / l2_norm(gradient).clamp_min(TINY)
