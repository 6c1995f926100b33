"""Partial forward passes that skip the calls whose outputs do not depend on a changed weight.

A *trace* of the model, made once on a few images, lists every module call in order and, for each weight, the moment of
its first use by its own module, by a parent that reads it, or by a tied copy. Calls that return before that moment do
not depend on the weight. A *recording* keeps their outputs for one batch, and a *replay* returns these outputs instead
of computing them: whole stages where possible, single layers next to the weight.

Some calls are always computed, since a stored output cannot replace them: those that write to their inputs (in-place
activations) and those that return a view of their inputs (flatten, identity) or a weight. Outputs that later code
overwrites are copied when they are recorded and at every replay. If a batch takes another path through the model than
the trace, the rest of that pass is computed in full.

The method assumes that in eval mode the output of a module depends only on its inputs and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Handler = Callable[..., Any]
NEVER = 1 << 62

# Reading these does not depend on the weight's values, so it is no use of the weight.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "is_nested")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


@dataclass
class Call:
    """One call of a module.

    Attributes:
        module: the module that was called.
        end: index of the first call after this one and all calls inside it.
        finish: moment at which the call returned.
        reusable: whether a stored output can replace the call.
        overwritten: whether later code writes into its output.
    """

    module: nn.Module
    end: int = 0
    finish: int = NEVER
    reusable: bool = True
    overwritten: bool = False


@dataclass(frozen=True)
class Trace:
    """Module calls in the order in which they began, and the moment of first use of each watched weight, by `id`."""

    calls: tuple[Call, ...]
    first_use: dict[int, int]

    def frontier(self, weight: nn.Parameter) -> frozenset[int]:
        """Return the indices of the outermost reusable calls that return before the first use of `weight`."""
        moment = self.first_use.get(id(weight), 0)
        found: list[int] = []
        index = 0
        while index < len(self.calls):
            call = self.calls[index]
            if call.reusable and call.finish < moment:
                found.append(index)
                index = call.end
            else:
                index += 1
        return frozenset(found)


@dataclass
class Recording:
    """Outputs of some calls on one batch.

    Attributes:
        outputs: flat leaves with their tree structure, by index of the call.
        replaced: whether the values of some were given up.
    """

    outputs: dict[int, tuple[list[Any], TreeSpec]] = field(default_factory=dict)
    replaced: bool = False

    def without(self, calls: frozenset[int]) -> Recording:
        """Return the recording with NaN, which takes no memory, in place of the values of some calls."""
        gone = calls & self.outputs.keys()
        new = {index: ([_nan(leaf) for leaf in self.outputs[index][0]], self.outputs[index][1]) for index in gone}
        return Recording(self.outputs | new, self.replaced or bool(gone))

    def nbytes(self) -> int:
        """Return the size of all outputs in bytes; each storage is counted once."""
        storages = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
            for leaves, _ in self.outputs.values()
            for leaf in leaves
            if isinstance(leaf, Tensor)
        }
        return sum(storages.values())


@contextmanager
def _intercepted(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Route every submodule's forward through ``handler(module, forward, *args, **kwargs)``."""
    missing = object()
    saved: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            if module is model:
                continue
            saved.append((module, module.__dict__.get("forward", missing)))
            module.__dict__["forward"] = partial(handler, module, module.forward)
        yield
    finally:
        for module, forward in saved:
            if forward is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


class _Tracer(TorchFunctionMode):
    """Records module calls, whether they modify their tensors, and the first use of each weight."""

    def __init__(self, watched: Iterable[nn.Parameter]) -> None:
        super().__init__()
        watched = list(watched)
        self._parameters = {_storage(weight) for weight in watched}
        self.calls: list[Call] = []
        self.first_use: dict[int, int] = {}
        self._watched = {id(weight) for weight in watched}
        self._returned: list[tuple[Call, Tensor, int]] = []
        self._clock = 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._watched and id(leaf) not in self.first_use:
                    self.first_use[id(leaf)] = self._tick()
        return func(*args, **kwargs)

    def handle(self, module: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
        call = Call(module)
        self.calls.append(call)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in inputs]
        output = forward(*args, **kwargs)
        call.end, call.finish = len(self.calls), self._tick()
        leaves = tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        call.reusable = (
            all(leaf is None or isinstance(leaf, (Tensor, int, float, str)) for leaf in leaves)
            and all(tensor._version == version for tensor, version in zip(inputs, versions, strict=True))
            and not ({_storage(t) for t in inputs} | self._parameters) & {_storage(t) for t in tensors}
        )
        self._returned += [(call, tensor, tensor._version) for tensor in tensors]
        return output

    def finished(self) -> Trace:
        for call, tensor, version in self._returned:
            call.overwritten |= tensor._version != version
        return Trace(tuple(self.calls), self.first_use)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def trace_calls(model: nn.Module, x: Tensor, weights: Iterable[nn.Parameter]) -> Trace:
    """Run `model` once on a few images and return the trace of its calls.

    Args:
        model: in eval mode.
        x: a few images [N, C, H, W].
        weights: parameters whose first use is recorded.
    """
    tracer = _Tracer(weights)
    with _intercepted(model, tracer.handle), tracer:
        model(x)
    return tracer.finished()


class _Pass:
    """Follows one forward pass along the trace; all calls are computed once it leaves the traced path."""

    def __init__(self, trace: Trace, recording: Recording, keep: frozenset[int], reuse: frozenset[int]) -> None:
        self._calls, self._recording, self._keep, self._reuse = trace.calls, recording, keep, reuse
        self._cursor = 0
        self._lost = False

    def handle(self, module: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
        index = self._cursor
        if not self._lost and (index >= len(self._calls) or self._calls[index].module is not module):
            self._lost = True
        if self._lost:
            return forward(*args, **kwargs)
        call = self._calls[index]
        if index in self._reuse and index in self._recording.outputs:
            self._cursor = call.end
            return _rebuild(*self._recording.outputs[index], copy=call.overwritten)
        self._cursor += 1
        output = forward(*args, **kwargs)
        self._lost |= self._cursor != call.end
        if index in self._keep and not self._lost:
            leaves, spec = tree_flatten(output)
            self._recording.outputs[index] = ([_keep(leaf, call.overwritten) for leaf in leaves], spec)
        return output


def _nan(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.new_full((), float("nan")).expand(leaf.shape)


def _keep(leaf: Any, copy: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone() if copy else leaf.detach()


def _rebuild(leaves: list[Any], spec: TreeSpec, copy: bool) -> Any:
    return tree_unflatten([leaf.clone() if copy and isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


@torch.no_grad()
def record(model: nn.Module, trace: Trace, x: Tensor, keep: frozenset[int]) -> tuple[Tensor, Recording]:
    """Run a forward pass and records the outputs of the calls with indices `keep`.

    Memory: the recorded outputs of the batch `x` [B, C, H, W], until the recording is deleted.

    Returns:
        The logits [B, K] and the recording.
    """
    recording = Recording()
    with _intercepted(model, _Pass(trace, recording, keep, frozenset()).handle):
        return model(x), recording


def replay(model: nn.Module, trace: Trace, x: Tensor, recording: Recording, reuse: frozenset[int]) -> Tensor:
    """Run a forward pass on the recorded batch and take the outputs of the calls with indices `reuse` from it.

    Calls in `reuse` that were not recorded are computed. Gradients do not flow into recorded outputs.

    Returns:
        The logits [B, K].
    """
    with _intercepted(model, _Pass(trace, recording, frozenset(), reuse).handle):
        return model(x)


def extend(model: nn.Module, trace: Trace, x: Tensor, recording: Recording, keep: frozenset[int]) -> Tensor:
    """Run a forward pass with the recorded outputs, and leave those of the calls with indices `keep` in the recording.

    A pass that an error ends leaves the outputs of the calls that returned before.

    Returns:
        The logits [B, K].
    """
    try:
        with _intercepted(model, _Pass(trace, recording, keep, frozenset(recording.outputs)).handle):
            return model(x)
    finally:
        for index in recording.outputs.keys() - keep:
            del recording.outputs[index]
