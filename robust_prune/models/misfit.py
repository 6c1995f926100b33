"""Explanations of why weights do not fit an architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .spec import ModelSpec

_SHOWN = 3
_STATISTICS = ("mean", "std", "mu", "sigma", "_mean", "_std")
_SCORES = ("popup_scores", "scores", "mask_scores")
_MASKS = ("_mask", "_orig")
_REPARAMETRIZED = ("_g", "_v", "_u", "original", "original0", "original1")


def problem(
    wanted: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    unexpected: Sequence[str],
    spec: ModelSpec,
    *,
    pruned_allowed: bool = False,
) -> str:
    """Return what is wrong with the weights and what it probably means; an empty string if they fit.

    Args:
        wanted: the model's state_dict.
        found: tensors of the file under the names of the model.
        unexpected: names of tensors of the file that the model does not have.
        spec: specification of the model.
        pruned_allowed: whether tensors may be smaller than those of the model.
    """
    missing = [name for name in wanted if name not in found]
    different = [
        name for name, tensor in wanted.items() if name in found and not _fits(found[name], tensor, pruned_allowed)
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} tensors are missing ({_few(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} are unexpected ({_few(unexpected)})")
    if different:
        shapes = [f"{n} is {_shape(found[n])} in the file, {_shape(wanted[n])} in the model" for n in different]
        problems.append(f"{len(different)} have another shape ({_few(shapes)})")
    if not problems:
        return ""
    return f"{'; '.join(problems)}. {_meaning(wanted, found, missing, unexpected, different, spec)}"


def unusable(stored: Tensor, target: Tensor) -> str:
    """Return why a tensor of a file cannot be a weight, or an empty string."""
    if stored.is_quantized:
        return "quantized"
    if stored.is_meta:
        return "without values (on the meta device)"
    if stored.layout != torch.strided:
        return "sparse"
    if target.is_floating_point() and not stored.is_floating_point():
        return f"of type {str(stored.dtype).removeprefix('torch.')}, where the model has floats"
    return ""


def _meaning(
    wanted: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    different: Sequence[str],
    spec: ModelSpec,
) -> str:
    masked = [name for name in unexpected if name.rpartition(".")[2].endswith(_SCORES)]
    if masked:
        return (
            f"{masked[0]} holds the scores of a mask, as HYDRA and HARP write them, and the file does not say how many "
            "weights the mask keeps. In the code that made it, set each weight to weight * mask and save it without "
            "the scores."
        )
    spectral = any(name.endswith("weight_u") for name in unexpected)
    if any(name.endswith(_MASKS) for name in unexpected) and not spectral:
        return "The weights are masked. Call torch.nn.utils.prune.remove on each layer and save them again."
    if missing and any(name.rpartition(".")[2].removeprefix("weight").endswith(_REPARAMETRIZED) for name in unexpected):
        return (
            "The weights are reparametrized (weight or spectral norm). Remove it (torch.nn.utils.remove_weight_norm, "
            "remove_spectral_norm or parametrize.remove_parametrizations) and save them again."
        )
    if missing and all(name.rpartition(".")[2] in _STATISTICS for name in missing):
        return (
            "They are the statistics of the network's own normalization: add them to the file, or register them with "
            "persistent=False."
        )
    if len(missing) * 2 > len(wanted):
        return "Is --arch right?"
    if missing or unexpected:
        named = sorted({name.split(".")[0] for name in [*missing, *unexpected]})
        return (
            f"The file and {spec.arch} differ in {_few(named)}: the weights are those of another variant of the "
            "architecture, or of one with further parts."
        )
    reasons = [reason for name in different if (reason := _reason(name, found[name], wanted[name], spec))]
    if len(reasons) < len(different):
        return "The widths differ: is it another member of the family, or an already pruned model?"
    return " ".join(dict.fromkeys(reasons))


def _reason(name: str, stored: Tensor, target: Tensor, spec: ModelSpec) -> str:
    channels, height, width = spec.input_size
    if stored.ndim != target.ndim:
        return ""
    places = [i for i, (a, b) in enumerate(zip(stored.shape, target.shape, strict=True)) if a != b]
    if "pos" in name.lower():
        side = _side(stored, target, height)
        for_size = f" of {side}x{side} pixels" if side else " of another size"
        return f"The checkpoint is for images{for_size}, the data have {height}x{width}. Resize the images to its size."
    if places == [0] and target.shape[0] == spec.num_classes:
        return f"The checkpoint tells {stored.shape[0]} classes apart, the data have {spec.num_classes}."
    if places == [1] and target.ndim == 4 and target.shape[1] == channels:
        return f"The checkpoint is for images of {stored.shape[1]} channels, the data have {channels}."
    return ""


def _side(stored: Tensor, target: Tensor, height: int) -> int:
    """Return the side in pixels of the images that a position embedding is for; 0 if it cannot be told."""
    sizes = [(a, b) for a, b in zip(stored.shape, target.shape, strict=True) if a != b]
    if len(sizes) == 2 and stored.ndim == 4:  # a grid [1, H, W, C] or [1, C, H, W]
        return height * sizes[0][0] // sizes[0][1]
    if len(sizes) != 1:
        return 0
    theirs, ours = sizes[0]
    tokens = ours - math.isqrt(ours) ** 2  # class and register tokens stand before the grid
    grid = theirs - tokens
    if grid <= 0 or math.isqrt(grid) ** 2 != grid:
        return 0
    return height * math.isqrt(grid) // math.isqrt(ours)


def _fits(stored: Tensor, target: Tensor, pruned_allowed: bool) -> bool:
    if not pruned_allowed:
        return stored.shape == target.shape
    return stored.ndim == target.ndim and all(s <= t for s, t in zip(stored.shape, target.shape, strict=True))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
