"""Reference copies of a model for trial cuts: double precision and random weights; the original is not changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..introspect.copies import copied
from ..introspect.obstacles import check_layers

_CONV = nn.modules.conv._ConvNd
_NORM = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_SEED = 2410


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model`, whose weights must be plain parameters.

    Raises:
        UsageError: as `check_layers`, or the model cannot be copied.
    """
    check_layers(model)
    return copied(model)


def images_like(example: Tensor, dtype: torch.dtype, count: int = 2) -> Tensor:
    """Return seeded random images [count, C, H, W] in [0, 1], of the size and device of `example` [1, C, H, W]."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.rand(count, *example.shape[1:], generator=generator, dtype=torch.float64).to(example.device, dtype)


def precise_copy(model: nn.Module, example: Tensor) -> tuple[nn.Module, torch.dtype]:
    """Return a copy in eval mode and float64, or float32 if the model cannot run in float64, and the data type.

    Raises:
        UsageError: a weight is re-parametrised, the model does not run on images like `example` [1, C, H, W], or it
            does not return one tensor of logits [N, K].
    """
    for dtype in (torch.float64, torch.float32):
        precise = copy_model(model).to(dtype).eval()
        try:
            with torch.no_grad():
                logits = precise(images_like(example, dtype))
        except Exception as error:
            if dtype == torch.float32:
                raise UsageError(
                    f"pruning needs a model that runs on images of shape {tuple(example.shape)}; it failed: "
                    f"{type(error).__name__}: {first_line(error)}. Check the input size and the number of channels."
                ) from error
            continue
        break
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"pruning needs a classifier that returns logits [N, K], but it returned {found}. Wrap the model."
        )
    return precise, dtype


def make_reference(model: nn.Module, example: Tensor) -> tuple[nn.Module, torch.dtype]:
    """Return a precise copy with seeded random weights, in eval mode, and its data type.

    Trained or freshly initialised weights can hide a wrong channel (norm weights of one or zero, nearly uniform
    attention); random weights do not. Batch-norm statistics are estimated on the copy, since activations would
    otherwise overflow in deep models.

    Raises:
        UsageError: as `precise_copy`.
    """
    reference, dtype = precise_copy(model, example)
    generator = torch.Generator().manual_seed(_SEED)
    in_layers: set[int] = set()
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, (_CONV, nn.Linear, *_NORM, nn.PReLU)):
                for name, parameter in module.named_parameters(recurse=False):
                    in_layers.add(id(parameter))
                    _randomise(module, name, parameter, generator)
        for parameter in reference.parameters():
            if id(parameter) not in in_layers and parameter.is_floating_point() and parameter.numel() > 1:
                wide = sum(n > 1 for n in parameter.shape) > 1
                parameter.copy_(_normal(parameter, generator, 0.3) if wide else _uniform(parameter, generator))
    for parameter in reference.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    reference.train()  # drops values cached from the former weights, such as attention biases
    reference.eval()
    _settle_batch_norms(reference, images_like(example, dtype, 8))
    return reference, dtype


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return max |found - wanted| / max |wanted|; infinity if shapes differ or a value is not finite."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all() and torch.isfinite(wanted).all()):
        return math.inf
    difference, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
    if difference == 0:
        return 0.0  # also where every logit is zero, as in a fresh model with a zero-initialised head
    return difference / scale if scale > 0 else math.inf


def first_line(error: BaseException) -> str:
    """Return the first 160 characters of an error's message, on one line."""
    return " ".join(str(error).split())[:160]


def _randomise(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if name == "bias":
        parameter.copy_(_normal(parameter, generator, 0.1))
    elif parameter.dim() == 1:
        parameter.copy_(_uniform(parameter, generator))
    else:
        fan_in = parameter[0].numel() if not getattr(module, "transposed", False) else parameter[:, 0].numel()
        parameter.copy_(_normal(parameter, generator, 1.5 / fan_in**0.5))


def _normal(like: Tensor, generator: torch.Generator, std: float) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like) * std


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5).to(like)


def _settle_batch_norms(reference: nn.Module, images: Tensor) -> None:
    norms = [m for m in reference.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        reference(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
