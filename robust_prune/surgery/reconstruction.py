"""Least squares in place of training: layers that read a cut group take over what its channels carried.

A reader computed ``Y = X W`` from all channels of the dense model and is left with ``X'``, what the pruned model hands
it. The weights that come nearest to the old outputs are the solution of a least-squares problem,

    min over V of  ‖Y − X' V‖² + λ‖V − W_kept‖²,

with closed form ``V = W_kept + (X'ᵀX' + λI)⁻¹ X'ᵀ(Y − X' W_kept)`` (channel pruning by reconstruction, He et al., 2017,
arXiv 1707.06168). Layers are solved in the order in which they run, each on inputs that the layers before it have
already repaired, so that errors do not pile up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..console import track
from ..errors import UsageError
from ..models.layout import weights_dtype
from ..structure.cutting import Place

RIDGE = 1e-3
"""λ in units of the mean of the diagonal of X'ᵀX'."""
_BATCH = 64
_MOST_ELEMENTS = 1 << 26
"""Of unfolded inputs held at once: 256 MB in single precision."""


_MOST_GRAM = 1 << 27
"""Elements of X'ᵀX': 1 GiB in double precision, 11,585 inputs. The head of a VGG at 224 pixels has more."""


class _Reached(Exception):
    """The layer has run; what lies behind it is not needed."""


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
    """Solves the weights of every ordinary convolution and linear layer of `small` that lost inputs; in place.

    Two partial forwards over `images` a layer. Memory: at most 256 MB of unfolded inputs (or one image's), what a
    forward of a batch takes, and a few square matrices, of at most 1 GiB each, of the layer's inputs times its kernel
    area. Batch-norm statistics stay: they still fit, since what they normalise is brought back to what it was.

    Args:
        small: the pruned model; its mode leaves as it came.
        dense: the model that it was cut from, on the same device; likewise.
        removed: positions of the dense model that went, as `Surgery.removed` tells them.
        images: training images, clean and adversarial, [N, C, H, W] in [0, 1], on any device.
        ridge: >= 0, see `RIDGE`. The more, the nearer the weights stay to the cut ones.
        batch_size: images a pass.

    Returns:
        Names of the layers that were solved. Grouped and transposed convolutions, layers that run more than once a
        pass, that have more inputs than such a matrix can have, or whose outputs cannot be matched stay as they were
        cut.

    Raises:
        UsageError: no images, or a ridge below 0.
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
    """Layers that lost inputs, each with the positions of its outputs that stay."""
    found = {}
    for target, side, _ in removed:
        if side != "in":
            continue
        module: Any = dense.get_submodule(target)
        # Subclasses that pad or standardise their weights in forward are not the linear map of their weight.
        plain = type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
        if plain and getattr(module, "groups", 1) == 1:
            lost = set(removed.get((target, "out", 0), ()))
            keep = [i for i in range(module.weight.shape[0]) if i not in lost]
            found[target] = torch.tensor(keep)
    return found


def _order(model: nn.Module, readers: Iterable[str], image: Tensor) -> list[str]:
    """Names of `readers` in the order in which they run, without those that run more than once."""
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in readers]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, count in calls.items() if count == 1]


def _passed(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of module `name`, where the pass ends."""
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
    if layer.weight[0].numel() ** 2 > _MOST_GRAM:
        return False
    gram: Tensor | None = None
    moment: Tensor | None = None
    for part in images.split(batch_size):
        x = part.to(layer.weight)
        (given, found), (_, wanted) = _passed(small, name, x), _passed(dense, name, x)
        some = max(1, _MOST_ELEMENTS // (given[0].numel() * layer.weight[0, 0].numel()))
        parts = zip(given.split(some), found.split(some), wanted.split(some), strict=True)
        for inputs, now, outputs in parts:
            rows, targets = _rows(layer, inputs), _targets(layer, outputs)[:, keep]
            if rows is None or targets.shape != (len(rows), len(keep)):
                return False
            rest = targets - _targets(layer, now)
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


def _rows(layer: Any, x: Tensor) -> Tensor | None:
    """What one output position reads, a row each, and a final 1 for the bias; None for a layer it cannot be told of."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
    elif layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    else:
        return None
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _targets(layer: Any, y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2).flatten(0, 1)
