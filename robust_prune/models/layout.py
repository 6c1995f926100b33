"""Memory formats and precisions that the hardware supports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FEWEST_CHANNELS = 8
"""Input channels of a strided 1x1 convolution from which its weight gradient is right in channels_last on CPUs."""


def may_be_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Return whether the weight gradients of `model` may be computed in channels_last.

    On CPUs without AVX-512, oneDNN (as of torch 2.14) writes past the end of its buffers for a 1x1 convolution with a
    stride and fewer than 8 input channels, as narrow shortcuts have: the process ends with a corrupted heap.
    """
    return device.type != "cpu" or not any(
        isinstance(layer, nn.Conv2d)
        and max(layer.kernel_size) == 1
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < FEWEST_CHANNELS
        for layer in model.modules()
    )


@torch.no_grad()
def fastest_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Return channels_last, in which convolutions are faster on CPUs and GPUs, unless `model` fails on it.

    Models that call ``view`` on their features fail, and `may_be_channels_last` knows others.

    Args:
        model: in eval mode.
        images: a few images [N, C, H, W], on the model's device and in its precision.
    """
    if not may_be_channels_last(model, images.device):
        return torch.contiguous_format
    try:
        model(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def weights_dtype(model: nn.Module) -> torch.dtype:
    """Return the data type of the model's parameters, which its images must have; float32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the hardware supports bf16; emulation is many times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def runs_in_bf16(model: nn.Module, images: Tensor) -> bool:
    """Return whether bf16 autocast pays: the hardware supports it, and `model` runs in it and has float32 weights.

    Args:
        model: in eval mode; it is run forward, and backward to the images.
        images: a few images [N, C, H, W], on the model's device.
    """
    return _may_use_bf16(model, images) and _runs(model, images, bf16=True)


def fastest_passes(model: nn.Module, images: Tensor) -> tuple[torch.memory_format, bool]:
    """Return the layout of the images and whether to use bf16 autocast, the fastest in which `model` runs.

    Args:
        model: in eval mode; it is run forward, and backward to the images.
        images: two images or more [N, C, H, W], on the model's device and in its precision; some code works with one
            image only.
    """
    bf16 = _may_use_bf16(model, images)
    layouts = [torch.channels_last] if may_be_channels_last(model, images.device) else []
    for layout in (*layouts, torch.contiguous_format):
        for fast in (True, False) if bf16 else (False,):
            if _runs(model, images.contiguous(memory_format=layout), fast):
                return layout, fast
    return torch.contiguous_format, False


def _may_use_bf16(model: nn.Module, images: Tensor) -> bool:
    return has_fast_bf16(images.device) and weights_dtype(model) == torch.float32


def _runs(model: nn.Module, images: Tensor, bf16: bool) -> bool:
    try:
        with torch.enable_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            x = images.detach().clone().requires_grad_()
            torch.autograd.grad(model(x).float().sum(), x, allow_unused=True)
    except Exception:  # code that wants another layout or precision may raise anything
        return False
    return True


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 on GPUs inside the block, and restore the settings on exit.

    TF32 rounds the inputs of fp32 convolutions and matrix products to 10 bits of mantissa. torch allows it for
    convolutions by default. It speeds up training, but the scoring of adversarial images must not depend on it.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
