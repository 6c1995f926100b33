"""Perturbation probe: forward passes in which layers return fixed values and their inputs are compared between passes.

Only the operations between layers remain of the model, so a changed input channel shows which output channels of other
layers it depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .cutting import CHANNEL_LAYERS, Place, free_tensor, is_depthwise
from .graph import BrokenMapping

_SEED = 1735
_PRODUCTS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
}  # fmt: skip
_MATRIX_PRODUCTS = {"matmul", "mm", "__matmul__"}
_PER_CHANNEL = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "prelu"}


@dataclass(frozen=True)
class Call:
    """One call of a layer in the first pass, in which nothing is perturbed.

    Attributes:
        entering: place of the input channels.
        leaving: place of the output channels; equal to `entering` if the layer works on each channel alone.
        came: input of the layer.
        came_dim: dimension of `came` that holds the channels.
        returned: fixed values that replace the layer's output.
        returned_dim: dimension of `returned` that holds the channels.
        step: perturbation that is added to perturbed channels of `returned`.
    """

    entering: Place
    leaving: Place
    came: Tensor
    came_dim: int
    returned: Tensor
    returned_dim: int
    step: Tensor


class Probe(TorchFunctionMode):
    """Replaces the outputs of a model's layers by fixed values during forward passes; see `probing`.

    Attributes:
        calls: calls of layers in the first pass, in order.
    """

    def __init__(self, model: nn.Module, stack: list[nn.Module]) -> None:
        super().__init__()
        self._model = model
        self._stack = stack
        self._names = {module: name for name, module in model.named_modules()}
        layers = [m for m in self._names if isinstance(m, CHANNEL_LAYERS)]
        self._owners = {
            id(t): m for m in layers for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        }
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._free = {id(t): name for name, t in tensors if id(t) not in self._owners and t.is_floating_point()}
        self._generator = torch.Generator().manual_seed(_SEED)
        self.calls: list[Call] = []
        self._output = torch.empty(0)
        self._started = False
        self._at = 0
        self._changes: Mapping[Place, Tensor] = {}
        self._seen: list[Tensor] = []

    def start(self, image: Tensor) -> None:
        """Run the first pass on `image` [1, C, H, W], in which nothing is perturbed."""
        self._output = self._model(image)
        self._started = True

    def producers(self) -> list[Place]:
        """Return the places that can be perturbed: outputs of convolutions and linear layers, and free tensors."""
        layers = dict.fromkeys(c.leaving for c in self.calls if c.leaving != c.entering)
        factors = {c.entering[0] for c in self.calls if c.entering[1] == "param"}
        free = [
            (name, "param", dim)
            for name in self._free.values()
            if name not in factors
            for dim, size in enumerate(free_tensor(self._model, name).shape)
            if size > 1
        ]
        return [*layers, *free]

    def size(self, place: Place) -> int:
        """Return the number of channels of a place that `producers` returned."""
        if place[1] == "param":
            return free_tensor(self._model, place[0]).shape[place[2]]
        return next(c.returned.shape[c.returned_dim] for c in self.calls if c.leaving == place)

    def run(self, image: Tensor, changes: Mapping[Place, Tensor]) -> list[Tensor]:
        """Run a pass on `image` [1, C, H, W] with perturbed channels.

        Args:
            image: the image of the first pass.
            changes: for each perturbed place, which of its channels are perturbed, bool [C].

        Returns:
            For each call which of its input channels changed, bool [C], and last the same for the logits [K].

        Raises:
            BrokenMapping: the model does not make the same calls as in the first pass.
        """
        self._at, self._changes, self._seen = 0, changes, []
        with self._changed_parameters():
            output = self._model(image)
        if self._at != len(self.calls):
            raise BrokenMapping("the model does not call the same layers in every pass")
        return [*self._seen, _moved(output, self._output, -1)]

    @contextmanager
    def _changed_parameters(self) -> Iterator[None]:
        saved = []
        for (name, side, dim), mask in self._changes.items():
            if side == "param":
                parameter = free_tensor(self._model, name)
                saved.append((parameter, parameter.detach().clone()))
                where = _along(mask, dim, parameter)
                parameter.add_(where * torch.rand(parameter.shape, generator=self._generator).to(parameter))
        try:
            yield
        finally:
            for parameter, old in saved:
                parameter.copy_(old)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _MATRIX_PRODUCTS and len(args) == 2 and self._is_factor(args[1]):
            return self._by_matrix(func, *args)
        if name not in _PRODUCTS and name not in _PER_CHANNEL:
            return func(*args, **kwargs)
        layer = self._layer(name, (*args, *kwargs.values()))
        if layer is None:
            return func(*args, **kwargs)
        came: Tensor = args[0] if args else kwargs["input"]
        if not self._started:
            self.calls.append(self._first(layer, name, came, func(*args, **kwargs)))
            return self.calls[-1].returned.clone()
        return self._again(came)

    def _is_factor(self, tensor: Tensor) -> bool:
        return tensor.dim() == 2 and id(tensor) in self._free

    def _by_matrix(self, func: Any, came: Tensor, matrix: Tensor) -> Tensor:
        """Return fixed values for the product of values with a free matrix, which is a linear layer."""
        if self._started:
            return self._again(came)
        result, name = func(came, matrix), self._free[id(matrix)]
        self.calls.append(self._call((name, "param", 0), (name, "param", 1), came, came.dim() - 1, result))
        return self.calls[-1].returned.clone()

    def _layer(self, function: str, arguments: Iterable[Any]) -> nn.Module | None:
        """Return the layer that calls `function`: the owner of a tensor among its arguments, or the running module."""
        owners = [self._owners[id(a)] for a in arguments if isinstance(a, Tensor) and id(a) in self._owners]
        for layer in (*owners, *self._stack[-1:]):
            products = isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))
            if not isinstance(layer, CHANNEL_LAYERS) or products != (function in _PRODUCTS):
                continue
            whole = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1
            shared = isinstance(layer, nn.PReLU) and layer.num_parameters == 1
            return None if whole or shared else layer
        return None

    def _first(self, layer: nn.Module, function: str, came: Tensor, result: Tensor) -> Call:
        name = self._names[layer]
        if isinstance(layer, nn.modules.conv._ConvNd):
            dim = came.dim() - layer.weight.dim() + 1
        else:
            dim = came.dim() - 1 if function in ("linear", "layer_norm") else 1
        side = "norm" if function in _PER_CHANNEL else "out"
        leaving: Place = (name, side, 0)
        entering = leaving if side == "norm" or is_depthwise(layer) else (name, "in", 0)
        return self._call(entering, leaving, came, dim, result)

    def _call(self, entering: Place, leaving: Place, came: Tensor, dim: int, result: Tensor) -> Call:
        # Small positive values, so that neither a rectifier nor a saturating gate hides a perturbation.
        value, step = (torch.rand(result.shape, generator=self._generator).to(result) * 0.3 + 0.1 for _ in range(2))
        return Call(entering, leaving, came.clone(), dim, value, dim, step)

    def _again(self, came: Tensor) -> Tensor:
        call = self.calls[self._at] if self._at < len(self.calls) else None
        if call is None or call.came.shape != came.shape:
            raise BrokenMapping("the model does not call the same layers in every pass")
        self._at += 1
        moved = _moved(came, call.came, call.came_dim)
        self._seen.append(moved)
        mask = moved if call.entering == call.leaving else self._changes.get(call.leaving)
        if mask is None:
            return call.returned.clone()
        return call.returned + _along(mask, call.returned_dim, call.returned) * call.step


def _moved(now: Tensor, before: Tensor, dim: int) -> Tensor:
    """Return which positions along `dim` differ anywhere, as a bool tensor on the CPU."""
    return (now != before).movedim(dim, 0).flatten(1).any(1).cpu()


def _along(mask: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return `mask` shaped to broadcast along `dim` of `like`."""
    return mask.to(like.device).view([-1 if d == dim else 1 for d in range(like.dim())])


@contextmanager
def probing(model: nn.Module) -> Iterator[Probe]:
    """Yield a `Probe` of `model` (in eval mode); inside the ``with`` block it replaces the outputs of the layers."""
    stack: list[nn.Module] = []
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(lambda m, inputs: stack.append(m)))
        handles.append(module.register_forward_hook(lambda m, inputs, output: stack.pop() and None))
    try:
        with Probe(model, stack) as probe:
            yield probe
    finally:
        for handle in handles:
            handle.remove()
