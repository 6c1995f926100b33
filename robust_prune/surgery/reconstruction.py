"""Least-squares repair: the layers behind a cut are fitted to the outputs of the dense model.

A layer computes ``Y = X W`` in the dense model and receives inputs ``X'`` in the pruned model. The weights that
reproduce its outputs best solve the least-squares problem

    min over V of  ‖Y − X' V‖² + λ‖V − W_kept‖²,

with closed form ``V = W_kept + (X'ᵀX' + λI)⁻¹ X'ᵀ(Y − X' W_kept)`` (channel pruning by reconstruction, He et al., 2017,
arXiv 1707.06168). Layers are solved in the order in which they run, each on inputs from layers that are already
repaired, so that errors do not accumulate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..console import track
from ..errors import UsageError
from ..models.layout import weights_dtype
from ..structure.cutting import Place
from ..structure.least_squares import RIDGE, fits, images_at_once, input_rows, is_plain, output_rows

_BATCH = 64


class _Reached(Exception):
    """Raised when the layer has run, to skip the rest of the forward pass."""


@torch.no_grad()
def reconstruct(
    small: nn.Module,
    dense: nn.Module,
    removed: Mapping[Place, Iterable[int]],
    images: Tensor,
    *,
    ridge: float = RIDGE,
    batch_size: int = _BATCH,
) -> tuple[str, ...]:
    """Fit the weights of every plain convolution and linear layer of `small` that lost inputs, in place.

    Cost: two partial forward passes over `images` for each layer. Memory: at most 256 MiB of unfolded inputs (or those
    of one image), the activations of a batch, and a few square matrices of at most 1 GiB each, whose size is the number
    of the layer's inputs times its kernel area. Batch-norm statistics are not changed, since the repair restores the
    activations that they normalise.

    Args:
        small: the pruned model; its mode is restored.
        dense: the dense model on the same device; its mode is restored.
        removed: removed positions of the dense model (`Surgery.removed`).
        images: training images, clean and adversarial, [N, C, H, W] in [0, 1], on any device.
        ridge: regularisation >= 0 towards the cut weights; see `RIDGE`.
        batch_size: images in each batch.

    Returns:
        Names of the fitted layers. Layers that run more than once in a pass, have too many inputs or have outputs that
        cannot be matched keep their cut weights, as do grouped and transposed convolutions.

    Raises:
        UsageError: there are no images, or `ridge` is below 0.
    """
    if len(images) == 0 or ridge < 0:
        raise UsageError(f"reconstruction needs images and a ridge >= 0, got {len(images)} images, ridge {ridge}")
    readers = _readers(dense, removed)
    device = next(small.parameters()).device
    solved = []
    with frozen_eval(small), frozen_eval(dense):
        order = _order(small, readers, images[:1].to(device, weights_dtype(small)))
        with track("Reconstruction, least squares", len(order)) as advance:
            for name in order:
                if _solve(small, dense, name, readers[name].to(device), images, ridge, batch_size):
                    solved.append(name)
                advance()
    return tuple(solved)


def _readers(dense: nn.Module, removed: Mapping[Place, Iterable[int]]) -> dict[str, Tensor]:
    """Return the layers that lost inputs, each with the positions of its kept outputs."""
    found = {}
    for target, side, _ in removed:
        if side != "in":
            continue
        module: Any = dense.get_submodule(target)
        if is_plain(module):
            lost = set(removed.get((target, "out", 0), ()))
            keep = [i for i in range(module.weight.shape[0]) if i not in lost]
            found[target] = torch.tensor(keep)
    return found


def _order(model: nn.Module, readers: Iterable[str], image: Tensor) -> list[str]:
    """Return the names of `readers` in the order in which they run, without those that run more than once."""
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    present = {name for name, _ in model.named_modules()}  # layers may have gone with a branch
    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in readers if name in present]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, count in calls.items() if count == 1]


def _passed(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input and output of module `name` in a forward pass that ends there."""
    kept: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        kept.extend((args[0] if args else kwargs["input"], output))
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        model(x)
    except _Reached:
        pass
    finally:
        handle.remove()
    return kept[0], kept[1]


def _solve(
    small: nn.Module, dense: nn.Module, name: str, keep: Tensor, images: Tensor, ridge: float, batch_size: int
) -> bool:
    layer: Any = small.get_submodule(name)
    if not fits(layer):
        return False
    gram: Tensor | None = None
    moment: Tensor | None = None
    for part in images.split(batch_size):
        x = part.to(layer.weight)
        (given, found), (_, wanted) = _passed(small, name, x), _passed(dense, name, x)
        some = images_at_once(layer, given)
        parts = zip(given.split(some), found.split(some), wanted.split(some), strict=True)
        for inputs, now, outputs in parts:
            rows, targets = input_rows(layer, inputs), output_rows(layer, outputs)[:, keep]
            if rows is None or targets.shape != (len(rows), len(keep)):
                return False
            rest = targets - output_rows(layer, now)
            squares, products = (rows.T @ rows).double(), (rows.T @ rest).double()
            gram = squares if gram is None else gram + squares
            moment = products if moment is None else moment + products
    if gram is None or moment is None:
        return False
    scale = float(gram.diagonal().mean())
    if not scale > 0:
        return False
    gram.diagonal().add_(max(ridge, 1e-9) * scale)
    change = torch.linalg.solve(gram, moment).T
    if not bool(torch.isfinite(change).all()):
        return False
    if layer.bias is not None:
        layer.bias += change[:, -1].to(layer.bias.dtype)
        change = change[:, :-1]
    layer.weight += change.reshape(layer.weight.shape).to(layer.weight.dtype)
    return True
