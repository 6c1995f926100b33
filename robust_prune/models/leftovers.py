"""Tensors of checkpoints that an architecture has no place for: masks, unused modules, and parts of other modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..introspect.modes import kept_modes
from .spec import ModelSpec

_BOOKKEEPING = ("n_averaged", "total_ops", "total_params", "num_updates", "decay")
_UNUSED = ("sub_block1",)
"""Modules of published code that forward never calls: TRADES' WideResNet builds a second first stage."""

_TRAINING_ONLY = ("aux", "aux1", "aux2", "AuxLogits")
_OTHERS = ("loss", "criterion", "metric", "acc", "teacher", "ema", "momentum", "queue", "swa")
MASK_KEYS = ("mask", "masks")
_SHOWN = 3


def fold_masks(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Multiply the masks of ``torch.nn.utils.prune`` into the weights that they belong to.

    Args:
        tensors: tensors by name, with pairs such as ``conv.weight_orig`` and ``conv.weight_mask``.
        wanted: the model's state_dict; pairs that it has itself are left alone.

    Returns:
        The tensors with ``conv.weight`` in place of each pair, and a sentence if there were any.
    """
    found, zeros, count = dict(tensors), 0, 0
    own = {name.rpartition(".")[2] for name in wanted}
    for key, mask in tensors.items():
        plain = key.removesuffix("_mask")
        last = key.rpartition(".")[2]
        original = tensors.get(f"{plain}_orig")
        if key == plain or last in own or original is None or original.shape != mask.shape:
            continue
        found[plain] = original * mask.to(original.dtype)
        del found[key], found[f"{plain}_orig"]
        zeros, count = zeros + int((mask == 0).sum()), count + mask.numel()
    if not count:
        return found, []
    return found, [f"masks were multiplied into the weights ({100 * zeros / count:.0f} % are 0)"]


def separate_masks(value: Any) -> dict[str, Tensor]:
    """Return masks of 0 and 1 that a file keeps beside its weights, under ``mask`` or ``masks``, by name of weight."""
    stored = [value[key] for key in MASK_KEYS if isinstance(value, Mapping) and isinstance(value.get(key), Mapping)]
    masks = {str(name): mask for part in stored for name, mask in part.items() if isinstance(mask, Tensor)}
    plain = all(bool(((mask == 0) | (mask == 1)).all()) for mask in masks.values())
    return masks if plain else {}


def masked(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the pairs that `fold_masks` folds, for those of which there is a separate mask."""
    found = dict(tensors)
    for name, mask in masks.items():
        key = next((k for k in (name, f"module.{name}", name.removeprefix("module.")) if k in tensors), None)
        if key is not None and tensors[key].shape == mask.shape:
            found[f"{key}_orig"], found[f"{key}_mask"] = found.pop(key), mask
    return found


def unused_tensors(network: nn.Module, spec: ModelSpec) -> set[str]:
    """Return the names of the tensors of modules that a forward pass in eval mode neither calls nor otherwise uses."""
    called: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda module, *_: called.add(module)) for m in network.modules()]
    parameters = dict(network.named_parameters())
    try:
        with kept_modes(network), torch.enable_grad():
            network.eval()
            logits = network(spec.blank_image())
            free = {name: p for name, p in parameters.items() if p.requires_grad}
            gradients = torch.autograd.grad(logits.sum(), [*free.values()], allow_unused=True) if free else ()
    finally:
        for handle in handles:
            handle.remove()
    used = {name for name, gradient in zip(free, gradients, strict=True) if gradient is not None}
    names: set[str] = set()
    for prefix, module in network.named_modules():
        own = {f"{prefix}.{name}" for name in [*module._parameters, *module._buffers]}
        if module not in called and not own & used:
            names |= own
    return names


def sort_out(
    extra: Mapping[str, Tensor], outside: Mapping[str, Tensor], prefix: str, complete: bool
) -> tuple[list[str], list[str]]:
    """Separate tensors that may be left out from those that show that the architecture is another one.

    Args:
        extra: tensors under the model's prefix that the model does not have.
        outside: tensors under other prefixes.
        prefix: prefix of the model's names in the file.
        complete: whether all tensors of the model were found.

    Returns:
        Names of unexpected tensors, and a sentence on what was left out.
    """
    unexpected = [key for key in extra if not _is_known(key)]
    dropped = [key for key in extra if _is_known(key) and not _is_bookkeeping(key)]
    for key in outside:
        # What lies beside the whole model in a training wrapper cannot take part in the model's forward.
        free = (complete and prefix) or _is_known(key)
        if not free:
            unexpected.append(key)
        elif not _is_bookkeeping(key):
            dropped.append(key)
    if not dropped:
        return unexpected, []
    parts = sorted({_part(key) for key in dropped})
    shown = ", ".join(parts[:_SHOWN]) + (", …" if len(parts) > _SHOWN else "")
    return unexpected, [f"{len(dropped)} tensors that the model does not use were left out ({shown})"]


def _is_bookkeeping(key: str) -> bool:
    return key.rpartition(".")[2] in _BOOKKEEPING


def _is_known(key: str) -> bool:
    first = key.split(".")[0]
    return (
        _is_bookkeeping(key)
        or any(part in _UNUSED for part in key.split("."))
        or first in _TRAINING_ONLY
        or any(word in first.lower().split("_") or first.lower().startswith(word) for word in _OTHERS)
    )


def _part(key: str) -> str:
    parts = key.split(".")
    return next((part for part in parts if part in _UNUSED), parts[0])
