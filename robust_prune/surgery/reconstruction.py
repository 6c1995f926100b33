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

_BATCH = 64
LEAST_ROWS, ROWS_PER_INPUT = 1 << 15, 32
"""Rows of a least-squares problem: `ROWS_PER_INPUT` for each unknown of an output, at least `LEAST_ROWS`."""
MOST_TARGETS = 1 << 28
"""Largest number of elements of the dense outputs in memory: 1 GiB in float32."""


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
    bf16: bool = False,
) -> tuple[str, ...]:
    """Fit the weights of every plain convolution and linear layer of `small` that lost inputs, in place.

    Each output position of an image is a row of the problem. Where these are more than 32 for each unknown, and more
    than 32,768, as many are drawn at random.

    Cost: a forward pass of `dense` over `images` for each GiB of outputs, and a partial one of `small` for each
    layer. Memory: at most 1 GiB of outputs (or those of one layer), 256 MiB of unfolded inputs (or those of one image),
    the activations of a batch, and a few square matrices of at most 1 GiB each, whose size is the number of the layer's
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
    batches = _Batches(images.split(batch_size), device, weights_dtype(small), bf16)
    solved = []
    with frozen_eval(small), frozen_eval(dense):
        first = batches.ready(images[:1])
        once = {name for name, count in _calls(dense, readers, first).items() if count == 1}
        order = [
            name
            for name, count in _calls(small, readers, first).items()
            if count == 1 and name in once and fits(small.get_submodule(name))
        ]
        most = {name: batches.rows(small.get_submodule(name)) for name in order}
        with track("Reconstruction, least squares", len(order)) as advance:
            for names in _in_memory({name: len(batches.parts) * most[name] * len(readers[name]) for name in order}):
                targets = batches.outputs(dense, {name: (readers[name], most[name]) for name in names})
                for name in names:
                    if _solve(small, name, batches, targets[name], ridge):
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


@dataclass(frozen=True)
class _Batches:
    """Batches of images [B, C, H, W], and how models run on them: device, data type, bf16 autocast or not."""

    parts: Sequence[Tensor]
    device: torch.device
    dtype: torch.dtype
    bf16: bool

    def ready(self, x: Tensor) -> Tensor:
        """Return images as the models take them."""
        return x.to(self.device, self.dtype)

    def rows(self, layer: Any) -> int:
        """Return the largest number of rows of a layer's problem that a batch contributes."""
        return math.ceil(max(LEAST_ROWS, ROWS_PER_INPUT * layer.weight[0].numel()) / len(self.parts))

    def passed(self, model: nn.Module, name: str) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Yield the input and output of module `name` for each batch, None where it does not run."""
        for x in self.parts:
            found: list[Tensor] = []

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor, found: list[Tensor] = found) -> None:
                found.extend((args[0] if args else kwargs["input"], output))
                raise _Reached

            self._run(model, x, {name: hook})
            yield (found[0].to(self.dtype), found[1].to(self.dtype)) if found else None

    def outputs(self, model: nn.Module, layers: Mapping[str, tuple[Tensor, int]]) -> dict[str, list[_Target | None]]:
        """Return rows of outputs of each batch, from a pass to the last of `layers`; None where a layer does not run.

        Args:
            model: the dense model.
            layers: layers in the order in which they run, each with channels and the largest number of rows.
        """
        found: dict[str, list[_Target | None]] = {name: [None] * len(self.parts) for name in layers}
        last = [*layers][-1]

        def note(name: str, number: int) -> Callable[..., None]:
            channels, most = layers[name]

            def hook(layer: Any, _: Any, __: Any, output: Tensor) -> None:
                count = output.numel() // len(layer.weight)
                generator = torch.Generator().manual_seed(number)
                at = torch.randperm(count, generator=generator)[:most].sort().values.to(self.device)
                rows = output_rows(layer, output, at)[:, channels].to(self.dtype)
                found[name][number] = _Target(rows, at, count)
                if name == last:
                    raise _Reached

            return hook

        for number, x in enumerate(self.parts):
            self._run(model, x, {name: note(name, number) for name in layers})
        return found

    def _run(self, model: nn.Module, x: Tensor, hooks: Mapping[str, Callable[..., None]]) -> None:
        handles = [
            model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()
        ]
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                model(self.ready(x))
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()


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


def _solve(small: nn.Module, name: str, batches: _Batches, targets: Sequence[_Target | None], ridge: float) -> bool:
    layer: Any = small.get_submodule(name)
    gram: Tensor | None = None
    moment: Tensor | None = None
    for passed, target in zip(batches.passed(small, name), targets, strict=True):
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
