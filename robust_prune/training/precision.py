"""The fastest precision and memory layout on this machine, found by timing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import kept_buffers
from ..introspect.modes import eval_mode, kept_modes
from ..introspect.randomness import seeded
from ..models.layout import has_fast_bf16, may_be_channels_last
from .decisions import decided, structure


@dataclass(frozen=True)
class Precision:
    """Precision and memory layout of forward and backward passes.

    Attributes:
        bf16: whether passes run under bf16 autocast; else in fp32.
        channels_last: whether tensors are channels_last; else contiguous.
        compiled: whether the model runs through `torch.compile`.
    """

    bf16: bool
    channels_last: bool
    compiled: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{'bf16' if self.bf16 else 'fp32'}, {layout}{', compiled' if self.compiled else ''}"

    @property
    def memory_format(self) -> torch.memory_format:
        """The torch memory format of images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def arrange(self, model: nn.Module) -> None:
        """Convert the model's convolution weights to this memory format, in place."""
        # Some releases of torch lack this keyword in the type of `Module.to`.
        to: Any = model.to
        to(memory_format=self.memory_format)


def choose_precision(model: nn.Module, images: Tensor, repeats: int = 3) -> Precision:
    """Return the fastest memory layout and precision for a forward and backward pass, found by timing.

    What was found once for a structure and a batch is kept for this machine (`decisions`). bf16 is tried where the
    hardware supports it. Candidates in which the model does not run are left out. Weights, gradients, modes and
    statistics of the model are not changed, but its memory format is.

    Args:
        model: the model, on its device.
        images: a batch of training size, [N, C, H, W] in [0, 1], on the same device.
        repeats: number of timed passes of each candidate, of which the fastest counts.

    Raises:
        RuntimeError: the model does not run in contiguous fp32.
    """
    inputs = [
        structure(model), list(images.shape), str(images.device.type), torch.get_num_threads(),
        may_be_channels_last(model, images.device),
    ]  # fmt: skip
    return Precision(**decided("precision", inputs, lambda: _fastest(model, images, repeats)))


def _fastest(model: nn.Module, images: Tensor, repeats: int) -> dict[str, bool]:
    formats = [False, True] if may_be_channels_last(model, images.device) else [False]
    types = [False, True] if has_fast_bf16(images.device) else [False]
    candidates = [Precision(bf16, channels_last) for bf16 in types for channels_last in formats]
    times, failed = dict.fromkeys(candidates, float("inf")), set[Precision]()
    with eval_mode(model):
        # Candidates are interleaved, so that a short load on the machine does not affect one of them alone.
        for attempt in range(repeats + 1):
            for candidate in candidates:
                if candidate in failed:
                    continue
                try:
                    if not attempt:
                        _train_once(model, images, candidate)
                    seconds = _seconds(model, images, candidate)
                except RuntimeError:  # models that call `view` on their features fail in channels_last
                    if candidate == candidates[0]:
                        raise
                    failed.add(candidate)
                    continue
                if attempt:
                    times[candidate] = min(times[candidate], seconds)
    best = min((c for c in candidates if c not in failed), key=lambda candidate: times[candidate])
    return {"bf16": best.bf16, "channels_last": best.channels_last}


def _train_once(model: nn.Module, images: Tensor, precision: Precision) -> None:
    """Run a pass in train mode, which may take branches that eval mode does not, without a trace."""
    precision.arrange(model)
    x = images.contiguous(memory_format=precision.memory_format)
    with kept_modes(model), kept_buffers(model), seeded(0), torch.no_grad():
        model.train()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision.bf16):
            model(x)


def _seconds(model: nn.Module, images: Tensor, precision: Precision) -> float:
    precision.arrange(model)
    x = images.contiguous(memory_format=precision.memory_format)
    parameters = [p for p in model.parameters() if p.requires_grad]
    begin = time.perf_counter()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision.bf16):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), torch.zeros(len(x), dtype=torch.long, device=x.device))
    torch.autograd.grad(loss, parameters, allow_unused=True)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - begin
