"""Which memory layout and number format the hardware is fast in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def fastest_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """channels_last, in which convolutions are faster on CPUs and GPUs alike, unless `model` refuses such images.

    Code that calls ``view`` on its features does.

    Args:
        model: in eval mode.
        images: a few of them [N, C, H, W], on the model's device and in its precision.
    """
    try:
        model(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The precision of the model's parameters, in which it wants its images; fp32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bf16 itself; where it does not, emulation is many times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether GPUs may round the inputs of fp32 convolutions and matrix products to TF32's 10 bits.

    torch allows it for convolutions unless told otherwise. Training gains by it; a verdict must not depend on it.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
