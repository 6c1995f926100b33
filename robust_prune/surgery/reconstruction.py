"""Least-squares repair: the layers behind a cut are fitted to the outputs of the dense model.

A layer computes ``Y = X W`` in the dense model and receives inputs ``X'`` in the pruned model. The weights that
reproduce its outputs best solve the least-squares problem

    min over V of  ‖Y − X' V‖² + λ‖V − W_kept‖²,

with closed form ``V = W_kept + (X'ᵀX' + λI)⁻¹ X'ᵀ(Y − X' W_kept)`` (channel pruning by reconstruction, He et al., 2017,
arXiv 1707.06168). Layers are solved in the order in which they run, each on inputs from layers that are already
repaired, so that errors do not accumulate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.context import frozen_eval
from ..console import track
from ..errors import UsageError
from ..models.layout import weights_dtype
from ..structure.cutting import Place
from ..structure.least_squares import RIDGE, fits, images_at_once, input_rows, is_plain, output_rows, single
from .passes import Batches, Continued, Reached

_BATCH = 64
LEAST_ROWS, ROWS_PER_INPUT = 1 << 15, 32
"""Rows of a least-squares problem: `ROWS_PER_INPUT` for each unknown of an output, at least `LEAST_ROWS`."""
MOST_TARGETS = 1 << 28
"""Largest number of elements of the dense outputs in memory: 1 GiB in float32."""


@torch.no_grad()
def reconstruct(
    small: nn.Module,
    dense: nn.Module,
    removed: Mapping[Place, Iterable[int]],
    images: Tensor,
    *,
    ridge: float = RIDGE,
    batch_size: int = _BATCH,
    bf16: bool = False,
) -> tuple[str, ...]:
    """Fit the weights of every plain convolution and linear layer of `small` that lost inputs, in place.

    Each output position of an image is a row of the problem. Where these are more than 32 for each unknown, and more
    than 32,768, as many are drawn at random.

    Cost: a forward pass of `dense` over `images` for each GiB of outputs, and little more than one of `small` where
    what lies before a layer can be recorded (see `passes`), or a partial one for each layer. Memory: at most 1 GiB of
    outputs (or those of one layer), 1 GiB of recordings, 256 MiB of unfolded inputs (or those of one image), the
    activations of a batch, and a few square matrices of at most 1 GiB each, whose size is the number of the layer's
    inputs times its kernel area. Batch-norm statistics are not changed, since the repair restores the activations that
    they normalise.

    Args:
        small: the pruned model; its mode is restored.
        dense: the dense model on the same device; its mode is restored.
        removed: removed positions of the dense model (`Surgery.removed`).
        images: training images, clean and adversarial, [N, C, H, W] in [0, 1], on any device.
        ridge: regularisation >= 0 towards the cut weights; see `RIDGE`.
        batch_size: images in each batch.
        bf16: whether forward passes run under bf16 autocast; the problems are float32 and solved in float64.

    Returns:
        Names of the fitted layers. Layers that run more than once in a pass, have too many inputs or have outputs that
        cannot be matched keep their cut weights, as do grouped and transposed convolutions.

    Raises:
        UsageError: there are no images, or `ridge` is below 0.
    """
    if len(images) == 0 or ridge < 0:
        raise UsageError(f"reconstruction needs images and a ridge >= 0, got {len(images)} images, ridge {ridge}")
    device = next(small.parameters()).device
    readers = {name: keep.to(device) for name, keep in _readers(dense, removed).items()}
    batches = Batches(images.split(batch_size), device, weights_dtype(small), bf16)
    solved = []
    with frozen_eval(small), frozen_eval(dense):
        first = batches.ready(images[:1])
        once = {name for name, count in _calls(dense, readers, first).items() if count == 1}
        order = [
            name
            for name, count in _calls(small, readers, first).items()
            if count == 1 and name in once and fits(small.get_submodule(name))
        ]
        most = {name: _most_rows(small.get_submodule(name), batches) for name in order}
        passes = Continued(small, order, batches)
        with track("Reconstruction, least squares", len(order)) as advance:
            for names in _in_memory({name: len(batches.parts) * most[name] * len(readers[name]) for name in order}):
                targets = _outputs(dense, batches, {name: (readers[name], most[name]) for name in names})
                for name in names:
                    if _solve(small.get_submodule(name), passes.to(name), targets[name], ridge):
                        solved.append(name)
                    advance()
    return tuple(solved)


@dataclass(frozen=True)
class _Target:
    """Rows of a layer's outputs in the dense model, for one batch.

    Attributes:
        rows: outputs [rows, channels], in the channels that stay.
        at: their positions among all rows of the batch, ascending.
        count: number of all rows of the batch.
    """

    rows: Tensor
    at: Tensor
    count: int


def _most_rows(layer: Any, batches: Batches) -> int:
    """Return the largest number of rows of a layer's problem that a batch contributes."""
    return math.ceil(max(LEAST_ROWS, ROWS_PER_INPUT * layer.weight[0].numel()) / len(batches.parts))


def _outputs(
    model: nn.Module, batches: Batches, layers: Mapping[str, tuple[Tensor, int]]
) -> dict[str, list[_Target | None]]:
    """Return rows of outputs of each batch, from a pass to the last of `layers`; None where a layer does not run.

    Args:
        model: the dense model.
        batches: the images.
        layers: layers in the order in which they run, each with channels and the largest number of rows.
    """
    found: dict[str, list[_Target | None]] = {name: [None] * len(batches.parts) for name in layers}
    last = [*layers][-1]

    def note(name: str, number: int) -> Callable[..., None]:
        channels, most = layers[name]

        def hook(layer: Any, _: Any, __: Any, output: Tensor) -> None:
            count = output.numel() // len(layer.weight)
            generator = torch.Generator().manual_seed(number)
            at = torch.randperm(count, generator=generator)[:most].sort().values.to(batches.device)
            rows = output_rows(layer, output, at)[:, channels].to(batches.dtype)
            found[name][number] = _Target(rows, at, count)
            if name == last:
                raise Reached

        return hook

    for number, x in enumerate(batches.parts):
        batches.run(model, model, x, {name: note(name, number) for name in layers})
    return found


def _in_memory(elements: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names in order, as many at once as have `MOST_TARGETS` elements together, at least one."""
    part: list[str] = []
    for name, count in elements.items():
        if part and sum(elements[other] for other in part) + count > MOST_TARGETS:
            yield part
            part = []
        part.append(name)
    if part:
        yield part


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


def _calls(model: nn.Module, names: Iterable[str], image: Tensor) -> Counter[str]:
    """Return how often each of the named layers runs in a pass, in the order in which they run first."""
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    present = {name for name, _ in model.named_modules()}  # layers may have gone with a branch
    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names if name in present]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _solve(
    layer: Any, passes: Iterable[tuple[Tensor, Tensor] | None], targets: Sequence[_Target | None], ridge: float
) -> bool:
    """Fit a layer, given its input and output and those of the dense model for each batch; return whether it could."""
    gram: Tensor | None = None
    moment: Tensor | None = None
    for passed, target in zip(passes, targets, strict=True):
        if passed is None or target is None or not target.count:
            continue
        given, found = passed
        if found.numel() != target.count * len(layer.weight):
            return False
        some, begin = images_at_once(layer, given), 0
        for inputs, now in zip(given.split(some), found.split(some), strict=True):
            end = begin + now.numel() // len(layer.weight)
            here = (target.at >= begin) & (target.at < end)
            at, begin = target.at[here] - begin, end
            known = input_rows(layer, inputs, at)
            if known is None or target.rows.shape[1] != len(layer.weight):
                return False
            rest = single(target.rows[here] - output_rows(layer, now, at))
            known = single(known)
            squares, products = (known.T @ known).double(), (known.T @ rest).double()
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
