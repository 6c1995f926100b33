"""Weights in checkpoints: their nesting, their prefix, and the check that they fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from .spec import ModelSpec

NESTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "weights",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema",
)
"""Keys under which training scripts store weights, in order of preference."""

_MEAN_NAMES = ("mean", "mu", "_mean")
_STD_NAMES = ("std", "sigma", "_std")
_BOOKKEEPING = ("n_averaged",)
_MAX_PREFIX_DEPTH = 4
_SHOWN = 3


@dataclass(frozen=True)
class FoundWeights:
    """Weights found in a file.

    Attributes:
        tensors: tensors by the names in the file, without ``_orig_mod.``.
        where: path of keys to the weights, e.g. ``"state_dict"``; empty at the top level.
        alternatives: other keys that contain weights.
        module: the module, if the file contains a pickled one.
    """

    tensors: Mapping[str, Tensor]
    where: str = ""
    alternatives: tuple[str, ...] = ()
    module: nn.Module | None = None


@dataclass(frozen=True)
class Fitted:
    """Weights under the names of a model.

    Attributes:
        tensors: tensors by name.
        prefix: prefix of the names in the file.
        mean, std: statistics of a normalization layer in the file, in [0, 1] units; empty if there is none.
    """

    tensors: dict[str, Tensor]
    prefix: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def find_weights(value: Any, what: str) -> FoundWeights:
    """Find the weights in the contents of a file.

    Args:
        value: a dict of tensors, a dict that contains one, or a module.
        what: name of the file, for the message.

    Raises:
        UsageError: there are no weights.
    """
    if isinstance(value, nn.Module):
        inner = _unwrap(value)
        return FoundWeights(_clean(inner.state_dict()), "pickled module", module=inner)
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} holds a {type(value).__name__}, not weights. Save model.state_dict() instead.")
    candidates = [key for key in NESTS if _holds_weights(value.get(key))]
    if candidates:
        inner_found = find_weights(value[candidates[0]], what)
        where = f"{candidates[0]}.{inner_found.where}".rstrip(".")
        return FoundWeights(inner_found.tensors, where, tuple(candidates[1:]), inner_found.module)
    tensors = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(value)[:5])) or "nothing"
        raise UsageError(f"{what} holds no weights: found the keys {keys}. Expected a state_dict.")
    return FoundWeights(_clean(tensors))


def fit_to(
    wanted: Mapping[str, Tensor], found: FoundWeights, spec: ModelSpec, what: str, *, pruned_allowed: bool = False
) -> Fitted:
    """Rename the weights to the names of a model, and check that they are complete and have the right shapes.

    Args:
        wanted: the model's state_dict.
        found: result of `find_weights`.
        spec: specification of the model.
        what: name of the file, for messages.
        pruned_allowed: whether tensors may be smaller than those of the model.

    Raises:
        UsageError: tensors are missing, unexpected or of another shape; the message lists the first of them.
    """
    prefix = _best_prefix(wanted, found.tensors)
    inside = {k.removeprefix(prefix): t for k, t in found.tensors.items() if k.startswith(prefix)}
    outside = {k: t for k, t in found.tensors.items() if not k.startswith(prefix)}
    mean, std = _statistics(outside | {k: t for k, t in inside.items() if k not in wanted}, spec.input_size[0])
    inside = {k: t for k, t in inside.items() if k in wanted or not _is_extra(k, t, bool(mean))}
    outside = {k: t for k, t in outside.items() if not _is_extra(k, t, bool(mean))}
    for name, tensor in wanted.items():
        # Old checkpoints lack the batch counter of batch-norm, which is used only without momentum.
        if name.endswith("num_batches_tracked") and name not in inside:
            inside[name] = tensor.clone()
    problems = _problems(wanted, inside, outside, pruned_allowed)
    if problems:
        raise UsageError(f"{what} does not fit {spec.arch}: {'; '.join(problems)}.{_hint(wanted, inside, spec)}")
    return Fitted(inside, prefix, mean, std)


def _unwrap(module: nn.Module) -> nn.Module:
    for attribute in ("_orig_mod", "module"):
        inner = module._modules.get(attribute)
        if inner is not None and len(module._modules) == 1:
            return _unwrap(inner)
    return module


def _holds_weights(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(v, Tensor) for v in value.values()) or any(_holds_weights(value.get(key)) for key in NESTS)


def _clean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}


def _best_prefix(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix under which most of the wanted names are found; the shortest of several."""
    prefixes = {""}
    for key in tensors:
        parts = key.split(".")[:-1][:_MAX_PREFIX_DEPTH]
        prefixes |= {".".join(parts[: n + 1]) + "." for n in range(len(parts))}
    return max(sorted(prefixes, key=lambda p: (len(p), p)), key=lambda p: sum(p + name in tensors for name in wanted))


def _statistics(tensors: Mapping[str, Tensor], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of a normalization layer, in [0, 1] units, or two empty tuples."""
    found: dict[str, tuple[float, ...]] = {}
    for key, tensor in tensors.items():
        last = key.rpartition(".")[2]
        for label, names in (("mean", _MEAN_NAMES), ("std", _STD_NAMES)):
            if last in names and tensor.numel() == channels and tensor.is_floating_point():
                found[label] = tuple(float(v) for v in tensor.flatten().tolist())
    if len(found) != 2 or min(found["std"]) <= 0 or max(found["mean"]) > 1:
        return (), ()
    return found["mean"], found["std"]


def _is_extra(key: str, tensor: Tensor, normalization_found: bool) -> bool:
    last = key.rpartition(".")[2]
    return last in _BOOKKEEPING or (normalization_found and last in _MEAN_NAMES + _STD_NAMES)


def _problems(
    wanted: Mapping[str, Tensor], inside: Mapping[str, Tensor], outside: Mapping[str, Tensor], pruned_allowed: bool
) -> list[str]:
    missing = [name for name in wanted if name not in inside]
    unexpected = [*(name for name in inside if name not in wanted), *outside]
    different = [
        f"{name} is {_shape(inside[name])} in the file, {_shape(tensor)} in the model"
        for name, tensor in wanted.items()
        if name in inside and not _compatible(inside[name], tensor, pruned_allowed)
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} tensors are missing ({_few(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} are unexpected ({_few(unexpected)})")
    if different:
        problems.append(f"{len(different)} have another shape ({_few(different)})")
    return problems


def _compatible(stored: Tensor, target: Tensor, pruned_allowed: bool) -> bool:
    if not pruned_allowed:
        return stored.shape == target.shape
    return stored.ndim == target.ndim and all(s <= t for s, t in zip(stored.shape, target.shape, strict=True))


def _hint(wanted: Mapping[str, Tensor], inside: Mapping[str, Tensor], spec: ModelSpec) -> str:
    different = [n for n, t in wanted.items() if n in inside and inside[n].shape != t.shape]
    if different and set(wanted) == set(inside):
        heads = [inside[n].shape[0] for n in different if wanted[n].shape[:1] == (spec.num_classes,)]
        if len(heads) == len(different):
            return f" The checkpoint tells {heads[0]} classes apart, the data have {spec.num_classes}."
        return " The widths differ: is it another member of the family, or an already pruned model?"
    return " Is --arch right?"


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (", …" if len(names) > _SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
