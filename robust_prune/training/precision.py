"""Which number format and memory layout is fastest here: found by timing, not by a flag that users must know."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..introspect.modes import eval_mode
from ..models.layout import has_fast_bf16


@dataclass(frozen=True)
class Precision:
    """How passes are computed: `bf16` autocast or fp32; `channels_last` or contiguous tensors; `compiled` or not."""

    bf16: bool
    channels_last: bool
    compiled: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{'bf16' if self.bf16 else 'fp32'}, {layout}{', compiled' if self.compiled else ''}"

    @property
    def memory_format(self) -> torch.memory_format:
        """The torch memory format for images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def arrange(self, model: nn.Module) -> None:
        """Puts the model's convolution weights into this layout, in place."""
        # Releases of torch disagree about whether this keyword exists in `Module.to`'s type.
        to: Any = model.to
        to(memory_format=self.memory_format)


def choose_precision(model: nn.Module, images: Tensor, repeats: int = 3) -> Precision:
    """Times a forward and backward pass in each layout (and in bf16 where the hardware has it); the fastest wins.

    The model's weights, gradients, modes and statistics are left as they were; its memory format is not. What the model
    cannot run in is no candidate.

    Args:
        model: on its device.
        images: a batch of the size that will be used [N, C, H, W] in [0, 1], on the same device.
        repeats: timed passes of each candidate; the best one counts.
    """
    formats = [False, True]
    types = [False, True] if has_fast_bf16(images.device) else [False]
    candidates = [Precision(bf16, channels_last) for bf16 in types for channels_last in formats]
    times, failed = dict.fromkeys(candidates, float("inf")), set[Precision]()
    with eval_mode(model):
        # Candidates take turns, so that a passing load on the machine does not fall on one of them alone.
        for attempt in range(repeats + 1):
            for candidate in candidates:
                if candidate in failed:
                    continue
                try:
                    seconds = _seconds(model, images, candidate)
                except RuntimeError:  # code that calls `view` on its features refuses channels_last
                    if candidate == candidates[0]:
                        raise
                    failed.add(candidate)
                    continue
                if attempt:
                    times[candidate] = min(times[candidate], seconds)
    return min((c for c in candidates if c not in failed), key=lambda candidate: times[candidate])


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
