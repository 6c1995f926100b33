"""The smallest images on which a model shows its whole structure, since trials on them take a fraction of the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..introspect.modes import eval_mode
from .reference import images_like

SIDES = (96, 128, 160)
"""Sides that are tried, in pixels: multiples of 32, by which networks divide, with maps of at least 3x3 at the end."""
_LEAST = 2
"""Least side of a feature map that is larger than that with images of the full size."""


@torch.no_grad()
def smaller_example(model: nn.Module, example: Tensor) -> Tensor:
    """Return one image [1, C, h, w] on which `model` calls the same layers, in the same order, as on `example`.

    Args:
        model: a classifier; it is not changed.
        example: one image [1, C, H, W]. It is returned where no smaller one serves: a model may have been built for one
            size, and another may lose its small feature maps.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    wanted: list[tuple[str, int, int]] | None = None
    for side in SIDES:
        if side >= min(example.shape[2:]):
            break
        try:
            wanted = wanted or _calls(model, images_like(example, dtype, 1))
            found = _calls(model, images_like(example[..., :1, :1].expand(-1, -1, side, side), dtype, 1))
        except Exception:  # the code of the model, on a size for which it may not be made
            continue
        same = [call[:2] for call in found] == [call[:2] for call in wanted]
        if same and all(now >= min(_LEAST, full) for (*_, now), (*_, full) in zip(found, wanted, strict=True)):
            return example.new_zeros(1, example.shape[1], side, side)
    return example


def _calls(model: nn.Module, images: Tensor) -> list[tuple[str, int, int]]:
    """Return the calls of layers in a pass: name, number of dimensions of the result, and side of a feature map."""
    calls: list[tuple[str, int, int]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, _: Any, result: Any) -> None:
            dims = result.dim() if isinstance(result, Tensor) else 0
            is_map = dims == 4 and isinstance(module, nn.Conv2d)
            calls.append((name, dims, min(result.shape[2:]) if is_map else _LEAST))

        return hook

    layers = [(name, module) for name, module in model.named_modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(note(name)) for name, module in layers]
    try:
        with eval_mode(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls
