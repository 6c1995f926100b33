"""Layers as linear maps of rows: one row of inputs, and one of outputs, for each output position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RIDGE = 1e-3
"""Weight of the regularisation as a multiple of the mean of the diagonal of XᵀX."""
MOST_ELEMENTS = 1 << 26
"""Largest number of unfolded input elements in memory: 256 MiB in float32."""
MOST_GRAM = 1 << 27
"""Largest number of elements of XᵀX: 1 GiB in float64, 11,585 inputs. The head of a VGG at 224 pixels has more."""


def fits(layer: Any) -> bool:
    """Return whether XᵀX of a plain layer's inputs has at most `MOST_GRAM` elements."""
    return bool(layer.weight[0].numel() ** 2 <= MOST_GRAM)


def images_at_once(layer: Any, x: Tensor) -> int:
    """Return the number of inputs `x` whose unfolded form has at most `MOST_ELEMENTS` elements, at least 1."""
    each = x.numel() // max(1, len(x))
    return max(1, MOST_ELEMENTS // max(1, each * layer.weight[0, 0].numel()))


def single(rows: Tensor) -> Tensor:
    """Return rows in float32 or wider, so that their products do not overflow."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def is_plain(layer: Any) -> bool:
    """Return whether a layer is a linear map of its weight: no groups, and no forward pass of its own.

    Subclasses may pad inputs or standardise weights in their forward pass.
    """
    return type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward) and getattr(layer, "groups", 1) == 1


def input_rows(layer: Any, x: Tensor, at: Tensor | None = None) -> Tensor | None:
    """Return the inputs [rows, inputs x kernel area], with a final 1 for a bias, or None for padding other than zeros.

    Args:
        layer: a plain convolution or linear layer.
        x: its input.
        at: positions of the rows to return, [rows]; by default all.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if at is None else rows[at]
    elif layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        rows = _flat(F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride), at)
    else:
        return None
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def output_rows(layer: Any, y: Tensor, at: Tensor | None = None) -> Tensor:
    """Return the outputs [rows, outputs] of a plain convolution or linear layer, in the order of `input_rows`."""
    if not isinstance(layer, nn.Linear):
        return _flat(y.flatten(2), at)
    rows = y.reshape(-1, y.shape[-1])
    return rows if at is None else rows[at]


def _flat(maps: Tensor, at: Tensor | None) -> Tensor:
    """Return the rows [images x positions, width] of [images, width, positions]."""
    each, positions = maps.transpose(1, 2), maps.shape[2]
    return each.flatten(0, 1) if at is None else each[at // positions, at % positions]
