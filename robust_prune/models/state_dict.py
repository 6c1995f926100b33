"""Weights in checkpoints: their nesting, their prefix, and the check that they fit a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from . import leftovers, misfit
from .spec import ModelSpec

_AVERAGES = ("ema", "averaged", "swa")
_PREFERRED = ("state_dict", "model_state", "model", "net", "network", "student", "params", "weights", "module", "best")
_AVOIDED = ("teacher", "target", "momentum", "discriminator", "optim", "sched", "callbacks", "loops", "scaler")
MEAN_NAMES = ("mean", "mu", "_mean", "means", "new_mean", "image_mean", "pixel_mean")
STD_NAMES = ("std", "sigma", "_std", "stds", "sds", "new_std", "image_std", "pixel_std")
"""Names of the statistics of normalization layers."""

_SETTINGS = ("args", "hyper_parameters", "hparams", "config", "cfg", "opt", "pretrained_cfg")
_MAX_PREFIX_DEPTH, _MAX_NESTING = 8, 6
_LARGEST_STD = 10.0
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class FoundWeights:
    """One set of weights in a file.

    Attributes:
        tensors: tensors by the names in the file, without ``_orig_mod.``.
        where: path of keys to the weights, e.g. ``"state_dict"``; empty at the top level.
        module: the module, if the file contains a pickled one.
    """

    tensors: Mapping[str, Tensor]
    where: str = ""
    module: nn.Module | None = None


@dataclass(frozen=True)
class Fitted:
    """Weights under the names of a model.

    Attributes:
        tensors: tensors by name.
        prefix: prefix of the names in the file.
        mean, std: statistics of a normalization layer in the file, in [0, 1] units; empty if there is none.
        notes: sentences on what was changed or left out.
    """

    tensors: dict[str, Tensor]
    prefix: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def find_weights(value: Any, what: str) -> tuple[FoundWeights, ...]:
    """Find the sets of weights in the contents of a file, the one to prefer first.

    Averaged weights (EMA, SWA) precede the others, as in timm; those of a teacher or a discriminator come last.

    Args:
        value: a dict of tensors, a dict that contains some, or a module.
        what: name of the file, for the message.

    Returns:
        At least one set.

    Raises:
        UsageError: there are no weights.
    """
    if not isinstance(value, nn.Module | Mapping | list | tuple):
        raise UsageError(f"{what} holds a {type(value).__name__}, not weights. Save model.state_dict() instead.")
    masks = leftovers.separate_masks(value)
    found = [
        replace(weights, tensors=leftovers.masked(weights.tensors, masks))
        for weights in sorted(_sets(value, ()), key=lambda weights: _rank(weights.where))
        if not masks or weights.where not in leftovers.MASK_KEYS
    ]
    if not found:
        keys = ", ".join(map(str, list(value)[:5])) if isinstance(value, Mapping) else ""
        raise UsageError(f"{what} holds no weights: found the keys {keys or 'none'}. Expected a state_dict.")
    return tuple(found)


def _sets(value: Any, path: tuple[str, ...], seen: set[int] | None = None) -> Iterator[FoundWeights]:
    seen = set() if seen is None else seen
    if id(value) in seen:  # a file may refer to one dict from many places, and from those to the next
        return
    if isinstance(value, list | tuple | Mapping):
        seen.add(id(value))
    where = ".".join(path)
    if isinstance(value, nn.Module):
        inner = _unwrap(value)
        yield FoundWeights(_clean(inner.state_dict()), where or "pickled module", inner)
    elif isinstance(value, list | tuple) and len(path) < _MAX_NESTING:
        for index, inner in enumerate(value[:_MAX_NESTING]):
            yield from _sets(inner, (*path, str(index)), seen)
    elif isinstance(value, Mapping) and len(path) < _MAX_NESTING:
        tensors = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, Tensor)}
        if tensors:
            yield FoundWeights(_clean(tensors), where)
        for key, inner in value.items():
            if isinstance(key, str) and not any(word in key.lower() for word in ("optim", "sched", "callback")):
                yield from _sets(inner, (*path, key), seen)


def _rank(name: str) -> tuple[int, int]:
    """Return the place of a set or prefix among others; smaller ones are preferred."""
    words = name.lower()
    if any(word in words for word in _AVOIDED):
        return 3, 0
    if any(word in words.replace("_", ".").split(".") for word in _AVERAGES):
        return 0, 0
    known = [place for place, word in enumerate(_PREFERRED) if words.rstrip(".").split(".")[0].startswith(word)]
    return (1, known[0]) if known else (2, 0)


def fit_all(
    wanted: Mapping[str, Tensor], found: Sequence[FoundWeights], spec: ModelSpec, what: str, network: nn.Module
) -> list[tuple[FoundWeights, Fitted]]:
    """Return the sets of weights that fit, at least one, each with its tensors under the names of the model.

    Args:
        wanted: the model's state_dict.
        found: result of `find_weights`.
        spec: specification of the model.
        what: name of the file, for messages.
        network: the model, of which parts may lack weights if its forward never calls them.

    Raises:
        UsageError: none fits; the message is about the set of which most names fit.
    """
    fitting: list[tuple[FoundWeights, Fitted]] = []
    problems: list[tuple[int, UsageError]] = []
    for weights in found:
        prefixes, matches = _best_prefixes(wanted, weights.tensors)
        for prefix in prefixes:
            try:
                fitted = _fit(wanted, weights, spec, what, network, prefix)
            except UsageError as error:
                problems.append((matches, error))
                continue
            if not any(_equal(fitted.tensors, other.tensors) for _, other in fitting):
                named = f"{weights.where or 'top level'}: {prefix}" if len(prefixes) > 1 else weights.where
                fitting.append((replace(weights, where=named), fitted))
    if not fitting:
        raise max(problems, key=lambda problem: problem[0])[1]
    return sorted(fitting, key=lambda fit: _rank(f"{fit[0].where}.{fit[1].prefix}"))


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(first[name].equal(second[name]) for name in first)


def _fit(
    wanted: Mapping[str, Tensor],
    found: FoundWeights,
    spec: ModelSpec,
    what: str,
    network: nn.Module | None = None,
    prefix: str = "",
) -> Fitted:
    """Rename the weights to the names of a model, and check that they are complete and have the right shapes.

    Tensors may be smaller than those of the model if the file contains a pickled module. Masks of
    ``torch.nn.utils.prune`` are multiplied into the weights.

    Raises:
        UsageError: tensors are missing, unexpected or of another shape; the message lists the first of them and says
            what they are.
    """
    tensors, notes = leftovers.fold_masks(found.tensors, wanted)
    inside = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    outside = {k: t for k, t in tensors.items() if not k.startswith(prefix)}
    extra = {k: t for k, t in inside.items() if k not in wanted}
    mean, std = statistics(outside | extra, spec.input_size[0])
    if mean:
        outside, extra = ({k: t for k, t in part.items() if not _is_statistic(k)} for part in (outside, extra))
    inside = {k: t for k, t in inside.items() if k in wanted}
    for name, tensor in wanted.items():
        # Old checkpoints lack the batch counter of batch-norm, which is used only without momentum.
        if name.endswith("num_batches_tracked") and name not in inside:
            inside[name] = tensor.clone()
    odd = next((n for n in inside if misfit.unusable(inside[n], wanted[n])), None)
    if odd is not None:
        raise UsageError(f"{what}: tensor {odd} is {misfit.unusable(inside[odd], wanted[odd])}. Save real floats.")
    missing = [name for name in wanted if name not in inside]
    if missing and network is not None and len(missing) < len(wanted) // 2:
        unused = leftovers.unused_tensors(network, spec)
        if set(missing) <= unused:
            inside |= {name: wanted[name].clone() for name in missing}
            notes.append(f"{len(missing)} tensors of parts that forward never calls are not in the file; left as built")
    complete = all(name in inside for name in wanted)
    unexpected, dropped = leftovers.sort_out(extra, outside, prefix, complete)
    notes += dropped
    smaller = found.module is not None
    problem = misfit.problem(wanted, inside, unexpected, spec, pruned_allowed=smaller)
    if problem:
        raise UsageError(f"{what} does not fit {spec.arch}: {problem}")
    return Fitted(inside, prefix, mean, std, tuple(notes))


def statistics(tensors: Mapping[str, Tensor], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of a normalization layer, in [0, 1] units, or two empty tuples.

    Args:
        tensors: tensors by name, of which those named ``mean`` and ``std``, or ``mu`` and ``sigma``, are looked at.
        channels: number of channels.
    """
    found: dict[str, tuple[float, ...]] = {}
    for key, tensor in tensors.items():
        last = key.rpartition(".")[2]
        for label, names in (("mean", MEAN_NAMES), ("std", STD_NAMES)):
            if last in names and tensor.numel() == channels and tensor.is_floating_point():
                found[label] = tuple(float(v) for v in tensor.flatten().tolist())
    return _in_unit_range(found["mean"], found["std"]) if len(found) == 2 else ((), ())


def configured_statistics(value: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the ``mean`` and ``std`` among the settings that a training script stored with the weights, or nothing."""
    if not isinstance(value, Mapping):
        return (), ()
    for key in _SETTINGS:
        section = value.get(key)
        settings = section if isinstance(section, Mapping) else getattr(section, "__dict__", {})
        mean, std = (_floats(settings.get(name), channels) for name in ("mean", "std"))
        if mean and std:
            return _in_unit_range(mean, std)
    return (), ()


def _floats(values: Any, count: int) -> tuple[float, ...]:
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    return tuple(map(float, values)) if numbers and len(values) == count else ()


def _in_unit_range(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the statistics for [0, 1] images, also if they are those of 0 to 255; nothing if they are neither."""
    if min(std) <= 0 or min(mean) < -1 or max(mean) > 255:
        return (), ()
    unit = 255.0 if max(mean) > 1 or min(std) > _LARGEST_STD else 1.0
    return tuple(v / unit for v in mean), tuple(v / unit for v in std)


def _is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in MEAN_NAMES + STD_NAMES


def _unwrap(module: nn.Module) -> nn.Module:
    for attribute in ("_orig_mod", "module"):
        inner = module._modules.get(attribute)
        if inner is not None and len(module._modules) == 1:
            return _unwrap(inner)
    return module


def _clean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_unwrapped(key): tensor for key, tensor in tensors.items()}


def _unwrapped(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _best_prefixes(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[list[str], int]:
    """Return the prefixes under which most of the wanted names are found, the one to prefer first, and their number."""
    known, _ = leftovers.fold_masks(tensors, wanted)
    prefixes = {""}
    for key in known:
        parts = key.split(".")[:-1][:_MAX_PREFIX_DEPTH]
        prefixes |= {".".join(parts[: n + 1]) + "." for n in range(len(parts))}
    counts = {prefix: sum(prefix + name in known for name in wanted) for prefix in prefixes}
    most = max(counts.values())
    best = sorted((p for p in prefixes if counts[p] == most), key=lambda p: (p != "", _rank(p), len(p), p))
    # Where some names are missing, only the message depends on the prefix.
    return (best if most and best[0] != "" else best[:1]), most
