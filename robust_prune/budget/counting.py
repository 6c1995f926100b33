"""Multiply-accumulates (MACs) of a model, counted for every matrix product that a forward pass runs.

Counting ATen operations includes products that counting by module type misses: subclassed convolutions, functional
linear layers and attention products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..introspect.modes import eval_mode

_MATRIX_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2)}


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product of a forward pass.

    Attributes:
        parameter: qualified name of the parameter that is a factor; None if both factors are activations or the weight
            is computed in the forward pass.
        module: qualified name of the innermost running module.
        macs: multiply-accumulates.
    """

    parameter: str | None
    module: str
    macs: int


def count_params(model: nn.Module) -> int:
    """Return the number of parameters; shared parameters are counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of one image's forward pass: convolutions, linear layers and attention products.

    Element-wise operations (norms, activations, pooling) are not counted, as is usual.

    Args:
        model: the model; it is not changed and runs in eval mode.
        example: images [B, C, H, W]; the count is divided by B.
    """
    return sum(p.macs for p in trace_products(model, example)) // len(example)


def trace_products(model: nn.Module, example: Tensor) -> list[Product]:
    """Return every convolution and matrix product of one forward pass in eval mode, in order.

    Args:
        model: the model; its modes and hooks are restored.
        example: images [B, C, H, W] on the model's device.
    """
    stack: list[str] = [""]
    # Gradient mode without the fast path keeps the products of nn.MultiheadAttention visible.
    with eval_mode(model), _module_stack(model, stack), _no_fast_path(), torch.enable_grad():
        recorder = _Recorder(model, stack)
        with recorder:
            model(example)
    return recorder.products


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, stack: list[str]) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._stack = stack
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("convolution", "_convolution"):
            weight = args[1]
            # A transposed convolution multiplies each input position, an ordinary one each output position.
            positions = args[0].numel() if args[6] else out.numel()
            self._add(positions * math.prod(weight.shape[1:]), weight)
        elif name in _MATRIX_PRODUCTS:
            left, right = (args[i] for i in _MATRIX_PRODUCTS[name])
            self._add(left.numel() * right.shape[-1], left, right)
        elif name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            query, key, value = args[:3]
            pairs = query.numel() // query.shape[-1] * key.shape[-2]
            self._add(pairs * (query.shape[-1] + value.shape[-1]))
        return out

    def _add(self, macs: int, *factors: Tensor) -> None:
        owners = (self._names.get(f.untyped_storage().data_ptr()) for f in factors)
        parameter = next((name for name in owners if name is not None), None)
        self.products.append(Product(parameter, self._stack[-1], macs))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the innermost running module on top of `stack`."""
    handles = []

    def enter(name: str) -> Any:
        return lambda module, args: stack.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
