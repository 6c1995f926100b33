"""The Square Attack (Andriushchenko et al., 2020, arXiv 1912.00049): random search with square patches, no gradients.

It needs only the logits, so it runs against an exported ONNX file as well as against the torch model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UsageError
from .objectives import margin, misclassified
from .projections import TINY, per_sample, project
from .threat import ThreatModel

Predict = Callable[[Tensor], Tensor]
FIRST_SHARE = 0.8
"""Share in [0, 1] of the image area that the first patches cover."""
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares in [0, 1] of the queries after each of which the covered area is halved."""


@torch.no_grad()
def square(
    predict: Predict,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    queries: int = 5000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return adversarial images found by random search on the margin.

    An image leaves the attack as soon as it is misclassified. Cost per image: at most `queries` forward passes.

    Args:
        predict: maps images [N, C, H, W] in [0, 1] to logits [N, K]; any callable, such as an ONNX session.
        x: images [N, C, H, W] in [0, 1].
        y: labels [N].
        threat: norm and radius.
        queries: largest number of forward passes for each image, the first included; the paper's schedule of patch
            sizes is scaled to this number.
        generator: random number generator of the search.

    Returns:
        Images [N, C, H, W] in the epsilon-ball around `x` and in [0, 1]: a misclassified image where the attack
        succeeded, the one with the largest margin elsewhere.

    Raises:
        UsageError: `queries` is below 1.
    """
    if queries < 1:
        raise UsageError(f"queries must be at least 1, got {queries}")
    draw = _Draw(x, generator)
    begin, propose = (_stripes, _patch) if threat.norm == "linf" else (_bumps, _moved_bump)
    points = project(begin(x, threat.epsilon, draw), x, threat)
    value, standing = _look(predict, points, y)
    for query in range(1, queries):
        rows = standing.nonzero().flatten()
        if len(rows) == 0:
            break
        here, origin = points[rows], x[rows]
        side = _side(query / queries, x.shape[-2:])
        ahead = project(propose(here, origin, threat.epsilon, side, draw), origin, threat)
        there, stands = _look(predict, ahead, y[rows])
        wins = (there > value[rows]) | ~stands
        points[rows[wins]] = ahead[wins]
        value[rows[wins]] = there[wins]
        standing[rows] = stands
    return points


class _Draw:
    """Random numbers drawn on the generator's device, so that a CPU generator gives the same on every device."""

    def __init__(self, x: Tensor, generator: torch.Generator | None) -> None:
        self._generator, self._like = generator, x
        self._source = generator.device if generator is not None else x.device

    def sign(self, *shape: int) -> Tensor:
        """Return random signs, -1 or 1, of the given shape."""
        drawn = torch.randint(0, 2, shape, generator=self._generator, device=self._source)
        return drawn.to(self._like) * 2 - 1

    def below(self, limit: int, count: int) -> Tensor:
        """Return random integers in [0, limit), [count]."""
        return torch.randint(0, limit, (count,), generator=self._generator, device=self._source).to(self._like.device)


def _look(predict: Predict, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = predict(x).to(x.device).float()
    return margin(logits, y).nan_to_num(nan=-torch.inf), ~misclassified(logits, y)


def _side(spent: float, size: torch.Size) -> int:
    """Return the side of the patches, in pixels, once this share of the queries is spent."""
    share = FIRST_SHARE / 2 ** sum(spent > limit for limit in HALVINGS)
    height, width = size
    return int(min(max(round((share * height * width) ** 0.5), 1), height, width))


def _stripes(x: Tensor, epsilon: float, draw: _Draw) -> Tensor:
    """Return `x` with vertical stripes of ±epsilon, one pixel wide."""
    return x + epsilon * draw.sign(len(x), x.shape[1], 1, x.shape[3])


def _patch(here: Tensor, x: Tensor, epsilon: float, side: int, draw: _Draw) -> Tensor:
    """Set one square of each image to `x` ± epsilon, with a random sign for each channel."""
    row, column = (draw.below(size - side + 1, len(x)) for size in x.shape[-2:])
    inside, _ = _window(x, row, column, side)
    return torch.where(inside, x + epsilon * draw.sign(len(x), x.shape[1], 1, 1), here)


def _window(x: Tensor, row: Tensor, column: Tensor, side: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a mask [N, 1, H, W] of the square at (row, column), and each pixel's coordinates in it, clamped."""
    down = torch.arange(x.shape[-2], device=x.device)[None, :] - row[:, None]
    across = torch.arange(x.shape[-1], device=x.device)[None, :] - column[:, None]
    inside = ((down >= 0) & (down < side))[:, None, :, None] & ((across >= 0) & (across < side))[:, None, None, :]
    return inside, (down.clamp(0, side - 1), across.clamp(0, side - 1))


def _bumps(x: Tensor, epsilon: float, draw: _Draw) -> Tensor:
    """Return `x` with a grid of bumps of random signs, five along the shorter side."""
    count, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    signs = draw.sign(count, channels, rows, columns)
    tiles = torch.kron(signs, _bump(side, x))
    delta = torch.zeros_like(x)
    delta[..., : rows * side, : columns * side] = tiles
    return x + _scaled(delta, epsilon)


def _moved_bump(here: Tensor, x: Tensor, epsilon: float, side: int, draw: _Draw) -> Tensor:
    """Move the L2 norm of the perturbation in one square into a bump in another square (L2 Square Attack)."""
    side = max(side // 2 * 2 + 1, 3)
    side = min(side, *x.shape[-2:])
    count, channels = x.shape[:2]
    delta = here - x
    unused = (epsilon**2 - delta.flatten(1).square().sum(1)).clamp_min(0)
    places = [tuple(draw.below(size - side + 1, count) for size in x.shape[-2:]) for _ in range(2)]
    (emptied, _), (filled, (down, across)) = (_window(x, row, column, side) for row, column in places)
    bump = _bump(side, x)
    if bool(draw.sign(1) > 0):
        bump = bump.T
    shape = bump[down[:, :, None], across[:, None, :]][:, None] * filled
    kept = delta * filled
    wanted = shape * draw.sign(count, channels, 1, 1) + kept / _channel_norm(kept).clamp_min(TINY)
    share = _channel_norm(delta * (emptied | filled)).square() + per_sample(unused, x) / channels
    delta = torch.where(emptied | filled, torch.zeros_like(delta), delta)
    delta = delta + wanted / _channel_norm(wanted).clamp_min(TINY) * share.sqrt()
    return x + _scaled(delta, epsilon)


def _bump(side: int, like: Tensor) -> Tensor:
    """Return a bump [side, side] of unit norm: two halves of opposite sign, each highest in its middle."""
    first = side // 2
    bump = torch.zeros(side, side, dtype=like.dtype, device=like.device)
    bump[:first] = _pyramid(first, side, like)
    bump[first:] = -_pyramid(side - first, side, like)
    return bump / bump.norm().clamp_min(TINY)


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:
    """Return nested rectangles [height, width]; the k-th from the outside adds 1/k^2."""
    if height == 0:
        return torch.zeros(0, width, dtype=like.dtype, device=like.device)
    down = torch.arange(height, device=like.device)
    across = torch.arange(width, device=like.device)
    deep = torch.minimum(
        torch.minimum(down, height - 1 - down)[:, None] * width // height,
        torch.minimum(across, width - 1 - across)[None, :],
    )
    most = int(deep.max())
    steps = torch.cumsum(1 / torch.arange(1, most + 2, device=like.device, dtype=like.dtype) ** 2, 0)
    return steps[deep]


def _channel_norm(delta: Tensor) -> Tensor:
    return delta.flatten(2).norm(dim=2)[..., None, None]


def _scaled(delta: Tensor, epsilon: float) -> Tensor:
    return delta * (epsilon / per_sample(delta.flatten(1).norm(dim=1), delta).clamp_min(TINY))
