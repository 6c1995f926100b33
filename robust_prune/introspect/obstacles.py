"""What in a module no step of this package can work with; each is refused by name, with the remedy."""

from __future__ import annotations

import warnings
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from ..errors import UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.qat", "torch.ao.quantization")
_SHARDED = ("FullyShardedDataParallel", "FSDP")
_FOLD = "With the trained weights in it, call {} for every such layer, and give that model, or its state_dict and an "
_FOLD += "architecture of plain layers."
_BY_HOOK = (
    (BasePruningMethod, "holds a mask of torch.nn.utils.prune", "torch.nn.utils.prune.remove(layer, 'weight')"),
    (SpectralNorm, "re-parametrises its weight (spectral norm)", "torch.nn.utils.remove_spectral_norm(layer)"),
    (WeightNorm, "re-parametrises its weight (weight norm)", "torch.nn.utils.remove_weight_norm(layer)"),
)


def check_tensors(model: nn.Module, *, lazy: bool = False) -> None:
    """Check that all parameters and buffers hold real numbers in memory, and the parameters float32.

    Args:
        model: the model.
        lazy: whether layers may be lazy, since the model is still to be run.

    Raises:
        UsageError: a layer is lazy or quantized, or a tensor is of another kind; the message names it and the remedy.
    """
    for name, module in model.named_modules():
        if not lazy and any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise UsageError(
                f"{_label(name, module)} is lazy and has no weights, even after an image went through the model. "
                "Build it with its number of inputs, or leave it out."
            )
        if type(module).__module__.startswith(_QUANTIZED):
            raise UsageError(
                f"{_label(name, module)} is quantized. Give the float32 model from before quantization; "
                "`--precision int8` quantizes the result."
            )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not isinstance(tensor, (UninitializedBuffer, UninitializedParameter)) and (found := _obstacle(tensor)):
            raise UsageError(f"{name} of {type(model).__name__} {found}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UsageError(
                f"{name} of {type(model).__name__} is {_short(parameter.dtype)}, and all parameters must be float32. "
                "Give model.float(); `--precision fp16` makes a smaller file of the result."
            )


def check_scripted(model: nn.Module) -> None:
    """Check that hooks see every layer, which all commands need, if only to count operations.

    Raises:
        UsageError: a layer is scripted or traced; the message names it and the remedy.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{_label(name, module)} is scripted or traced by torch.jit, so that its layers can be neither watched "
                "nor cut. Build it from plain torch modules, without torch.jit; the weights' names stay the same."
            )


def check_layers(model: nn.Module) -> None:
    """Check that every layer's weight is a plain parameter, and that hooks see every layer.

    Raises:
        UsageError: a layer is scripted, compiled, wrapped, masked or re-parametrised; the message names it and the
            remedy.
    """
    check_scripted(model)
    for name, module in model.named_modules():
        label = _label(name, module)
        if isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None:
            raise UsageError(
                f"{label} is compiled by torch.compile, so that its layers can be neither watched nor cut. Give the "
                "model before compilation; training compiles it by itself."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel) or type(module).__name__.startswith(_SHARDED):
            raise UsageError(f"{label} spreads a module over devices. Give the module inside it (`.module`).")
        for hook in module._forward_pre_hooks.values():
            for kind, what, remedy in _BY_HOOK:
                if isinstance(hook, kind):
                    raise UsageError(f"pruning needs plain weights, but {label} {what}. {_FOLD.format(remedy)}")
        if parametrize.is_parametrized(module):
            of = next(iter(module.parametrizations))
            raise UsageError(
                f"pruning needs plain weights, but {label} re-parametrises its {of} (weight norm, spectral norm or the "
                "like). " + _FOLD.format(f"torch.nn.utils.parametrize.remove_parametrizations(layer, '{of}')")
            )


def _obstacle(tensor: Tensor) -> str:
    """Return what is wrong with a tensor and the remedy, or an empty string."""
    if tensor.is_meta:
        return "is on the meta device, without values. Build the model on the CPU, or load its weights first."
    if tensor.is_quantized:
        return "is quantized. Give the float32 model from before quantization."
    if tensor.layout != torch.strided:
        return f"is stored as {_short(tensor.layout)}. Give dense tensors (`.to_dense()`)."
    if hasattr(tensor, "device_mesh"):
        return "is spread over devices. Gather the model on one device first."
    if tensor.is_inference():
        return "was made under torch.inference_mode, and has no gradient. Build the model outside of it."
    if tensor.is_complex():
        return "is complex, and only real numbers are supported. Hold real and imaginary part as two real tensors."
    return ""


def _short(kind: object) -> str:
    return str(kind).removeprefix("torch.")


def _label(name: str, module: nn.Module) -> str:
    kind = getattr(module, "original_name", type(module).__name__)
    return f"layer {name} ({kind})" if name else f"the model ({kind})"
