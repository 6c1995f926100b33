"""Paths through a model: the parameters that its forward passes use, in both modes and on different images.

A branch that only training runs, or that only some images take, is invisible to one pass in eval mode. The passes that
show every part of a model are found here; the graph is traced, and cuts are proved, on all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.base import ImageSet, images_at_once, random_images
from ..errors import UsageError
from ..introspect.modes import kept_modes
from ..introspect.randomness import seeded
from ..models.layout import weights_dtype
from .reference import first_line, images_like

_SEED = 4127
_MOST_IMAGES = 64
IN_A_PASS = 4  # images of a pass; batch norm needs several in train mode
_TRAINING_PASSES = 4  # with different random numbers, where code decides by a tensor's value
_VIEWS = {"data", "T", "mT", "H", "mH", "real", "imag"}  # attributes that hold a tensor's values
_DECISIONS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "equal", "allclose"}


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass: images [N, C, H, W] in [0, 1], the mode, and the seed of its random numbers."""

    images: Tensor
    training: bool = False
    seed: int = _SEED

    def run(
        self, model: nn.Module, watch: AbstractContextManager[object] | None = None, *, backward: bool = False
    ) -> Tensor:
        """Return what `model` returns; modes, buffers and random number generators are restored.

        Args:
            model: the model.
            watch: entered for the call of the model.
            backward: whether to run back to the images as well.

        Raises:
            ArithmeticError: the gradient is not finite.
            Exception: whatever the model raises.
        """
        images = self.images.clone().requires_grad_() if backward else self.images
        with kept_modes(model), _kept_buffers(model), seeded(self.seed):
            model.train()  # drops values that some models cache in eval mode
            model.train(self.training)
            with watch or nullcontext():
                logits = model(images)
            if backward:
                (gradient,) = torch.autograd.grad(logits.square().sum(), images)
                if not bool(torch.isfinite(gradient).all()):
                    raise ArithmeticError("the gradient in the images is not finite")
                return logits.detach()
            return logits

    def to(self, dtype: torch.dtype) -> Pass:
        """Return the pass with images of another type."""
        return replace(self, images=self.images.to(dtype))

    def like(self, images: Tensor) -> Pass:
        """Return the pass with its images in the size of others."""
        size = tuple(images.shape[2:])
        if tuple(self.images.shape[2:]) == size:
            return self
        return replace(self, images=F.interpolate(self.images, size, mode="bilinear", antialias=True))

    def again(self) -> Pass:
        """Return the pass with other random numbers."""
        return replace(self, seed=self.seed + 1)

    @property
    def where(self) -> str:
        """Where the pass takes place, for a message."""
        return "in train mode" if self.training else "on other images"


@dataclass(frozen=True)
class Paths:
    """Passes that show every part of a model.

    Attributes:
        passes: passes on real images, in both modes, that together use all parameters which some pass uses.
        hidden: those that use a parameter or buffer which a usual pass does not.
        reasons: why a layer, or a parameter or buffer of no layer, is not always used, by its name.
        unused: layers, and parameters of no layer, that no pass uses.
    """

    passes: tuple[Pass, ...]
    hidden: tuple[Pass, ...]
    reasons: Mapping[str, str]
    unused: tuple[str, ...]


def sample_images(images: ImageSet, seed: int) -> Tensor:
    """Return up to 64 random images, fewer above 64x64 pixels, as float [N, C, H, W] in [0, 1]."""
    return random_images(images, images_at_once(images, _MOST_IMAGES), seed)[0]


def find_paths(model: nn.Module, images: Tensor, usual: Collection[str]) -> Paths:
    """Return the passes that show every part of `model`.

    Each image is run alone only if the model's code decides by the value of a tensor.

    Args:
        model: a classifier; it is not changed.
        images: real images [N, C, H, W] in [0, 1], of several kinds.
        usual: parameters and buffers that are known to be used.

    Raises:
        UsageError: the model fails on an image or in train mode, or does not return one tensor of logits [N, K].
    """
    few = images[:IN_A_PASS]
    found = [_used(model, step) for step in (Pass(few[:1]), Pass(few))]
    if any(use.decides for use in found):  # the batch is last, since what joins images is hard to trace
        found = [*(_used(model, Pass(image[None])) for image in images), found[-1]]
    training = [_used(model, Pass(few, True))]
    if training[0].decides:
        training += [_used(model, Pass(few, True, _SEED + i)) for i in range(1, _TRAINING_PASSES)]
    in_eval = frozenset(chain(*(use.names for use in found)))
    in_training = frozenset(chain(*(use.names for use in training)))
    always = in_eval.intersection(*(use.names for use in found))
    reasons = {owner_of(model, name): "only some images take it" for name in sorted(in_eval - always)}
    reasons |= {owner_of(model, name): "only training runs it" for name in sorted(in_training - in_eval)}
    owners = {owner_of(model, name) for name, p in model.named_parameters() if _may_hold_channels(p)}
    unused = owners - {owner_of(model, name) for name in in_eval | in_training}
    passes = dict.fromkeys([found[-1].step, *_covering((), found), *_covering(in_eval, training), training[0].step])
    return Paths(tuple(passes), tuple(_covering(usual, found + training)), reasons, tuple(sorted(unused)))


def paths_of(model: nn.Module, example: Tensor, images: Tensor | None, usual: Collection[str]) -> Paths:
    """Return the result of `find_paths` on `images`, by default random ones of the size of `example` [1, C, H, W]."""
    found = images if images is not None else images_like(example, torch.float32, IN_A_PASS)
    return find_paths(model, found.to(example.device, weights_dtype(model)), usual)


def used_names(model: nn.Module, images: Tensor) -> frozenset[str]:
    """Return the names of the floating-point parameters and buffers that a pass in eval mode uses."""
    return _used(model, Pass(images)).names


@dataclass(frozen=True)
class _Use:
    """A pass, the parameters and buffers it uses, and whether the model's code decides by a tensor's value."""

    step: Pass
    names: frozenset[str]
    decides: bool


def _covering(known: Collection[str], found: Sequence[_Use]) -> list[Pass]:
    """Return passes, in order, each of which uses something that is not `known` and that earlier ones do not use."""
    seen, chosen = set(known), []
    for use in found:
        if use.names - seen:
            chosen.append(use.step)
            seen |= use.names
    return chosen


def owner_of(model: nn.Module, name: str) -> str:
    """Return the layer that holds a parameter or buffer, or its own name if that is held by a module of layers."""
    owner = name.rpartition(".")[0]
    return owner if owner and not any(True for _ in model.get_submodule(owner).children()) else name


def _used(model: nn.Module, step: Pass) -> _Use:
    watch = _Watch(model)
    where = "in train mode" if step.training else "in eval mode"
    try:
        with torch.no_grad():
            logits = step.run(model, watch)
    except Exception as error:
        raise UsageError(
            f"pruning needs a model that runs {where} on images of shape {tuple(step.images.shape)}; it failed: "
            f"{type(error).__name__}: {first_line(error)}. Check the input size and the number of channels."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"pruning needs a classifier that returns logits [N, K], but {where} it returned {found}. Wrap the model."
        )
    return _Use(step, frozenset(watch.used), watch.decides)


class _Watch(TorchFunctionMode):
    """Records which parameters and buffers of a model, that may hold channels, reach an operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = chain(model.named_parameters(), model.named_buffers())
        self._names = {id(tensor): name for name, tensor in named if _may_hold_channels(tensor)}
        self.used: set[str] = set()
        self.decides = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.decides = self.decides or name in _DECISIONS
        if name != "__get__" or getattr(getattr(func, "__self__", None), "__name__", "") in _VIEWS:
            self.used.update(self._names[id(t)] for t in _tensors((args, kwargs)) if id(t) in self._names)
        return func(*args, **kwargs)


def _may_hold_channels(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore all buffers on exit, also those that the model replaces; autograd does not see it."""
    kept = [
        (m, dict(m._buffers), [(b, b.clone()) for b in m._buffers.values() if b is not None]) for m in model.modules()
    ]
    try:
        yield
    finally:
        for module, buffers, values in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            for buffer, value in values:
                buffer.data.copy_(value)
